"""Answers by greedy generation, and how many of them are exactly right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList


def answer(
    model: PreTrainedModel,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    end_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    requested: Callable[[], bool] = lambda: False,
) -> list[str]:
    """The most likely answer to each prompt as text; as `answer_ids` has it."""
    found = answer_ids(model, device, tokenizer.pad_token_id, prompts, end_ids, max_new_tokens, batch_size, requested)
    told = (ids[:-1] if ids and ids[-1] in end_ids else ids for ids in found)
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in told]


@torch.no_grad()
def answer_ids(
    model: PreTrainedModel,
    device: torch.device,
    pad_token_id: Any,
    prompts: Sequence[Sequence[int]],
    end_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    requested: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """The most likely answer to each prompt, token by token, up to an end token, which it has, or max_new_tokens.

    pad_token_id  fills shorter prompts up; None: the first of `end_ids`
    requested     whether it was asked to stop; the answers are then cut off where they are
    """
    pad = end_ids[0] if pad_token_id is None else pad_token_id
    how = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(end_ids), pad_token_id=pad, use_cache=True
    )
    generate: Any = model.generate

    def asked(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), requested(), device=ids.device)

    stop = StoppingCriteriaList([cast(StoppingCriteria, asked)])
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # least padding
    with evaluating(model):
        for first in range(0, len(by_length), batch_size):
            if requested():
                break
            members = by_length[first : first + batch_size]
            longest = max(len(prompts[i]) for i in members)
            ids = torch.full((len(members), longest), pad, device=device)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(members):  # answers begin where prompts end, so padding goes to the left
                ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i], device=device)
                mask[row, longest - len(prompts[i]) :] = 1
            out = generate(input_ids=ids, attention_mask=mask, generation_config=how, stopping_criteria=stop)
            for row, i in enumerate(members):
                tokens = out[row, longest:].tolist()
                end = next((at for at, token in enumerate(tokens) if token in end_ids), len(tokens))
                answers[i] = tokens[: end + 1]
    return answers


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model drops nothing while the context lasts; then it is in the mode in which it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def exact(expected: str, got: str) -> bool:
    """Whether an answer is the expected one to the letter, blanks around it aside."""
    return expected.strip() == got.strip()
