"""How a model does on the held-out rows: the loss, and answers counted right or wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.config import TrainingConfig
from qlora.evaluate.generation import answer, exact
from qlora.machine import free_bytes
from qlora.model.batch import Batch, Question

GROUP = 8  # micro-batches that pass through a layer together: more read each layer less often, and take more memory
SAMPLES = 3  # answers that are shown


class Scored(Protocol):
    @property
    def loss(self) -> float: ...
    @property
    def supervised(self) -> int: ...


class Scorer(Protocol):
    """The training step can do this, in either order."""

    device: torch.device

    def evaluate(self, batches: Sequence[Batch]) -> Scored: ...
    def whole_model(self, room: float) -> AbstractContextManager[None]: ...


class HeldOut:
    """Scores the held-out rows whenever it is asked to, and keeps the last figures."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        step: Scorer,
        batches: Sequence[Batch],
        questions: Sequence[Question],
        end_ids: Sequence[int],
        training: TrainingConfig,
        emit: Callable[..., Any],
        requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        batches    held-out rows for the loss; may be empty
        questions  the same rows as prompts; empty where the recipe does not ask for answers
        end_ids    tokens that end an answer
        emit       emit(kind, **fields) reports an event
        requested  whether it was asked to stop: what is half-done is then left, without a figure
        """
        self.model, self.tokenizer, self.step = model, tokenizer, step
        self.batches, self.questions, self.end_ids = batches, questions, end_ids
        self.training, self.emit, self.requested = training, emit, requested
        self.figures: dict[str, float] = {}

    def loss(self, at_step: int) -> None:
        """Mean loss over the supervised tokens, with dropout off; memory does not grow with the rows."""
        if not self.batches:
            return
        started, total, tokens = time.perf_counter(), 0.0, 0
        was_training = self.model.training
        self.model.eval()
        for first in range(0, len(self.batches), GROUP):
            if self.requested():
                break
            taken = [self.batches[i].to(self.step.device) for i in range(first, len(self.batches))[:GROUP]]
            scored = self.step.evaluate(taken)
            total += scored.loss * scored.supervised
            tokens += scored.supervised
        self.model.train(was_training)
        if self.requested():
            return
        self.figures["eval_loss"] = total / max(tokens, 1)
        seconds = time.perf_counter() - started
        self.emit("evaluation", step=at_step, eval_loss=total / max(tokens, 1), eval_tokens=tokens, seconds=seconds)

    def answers(self, at_step: int) -> None:
        """Let the model answer every question greedily, and count the answers that are right to the letter."""
        if not self.questions:
            return
        started = time.perf_counter()
        # A generated token passes through every layer: it is worth to have them all dense, where they fit.
        with self.step.whole_model(free_bytes(self.step.device) / 2):
            got = answer(
                self.model,
                self.step.device,
                self.tokenizer,
                [question.ids for question in self.questions],
                self.end_ids,
                self.training.generation_max_length,
                self.training.per_device_eval_batch_size,
                self.requested,
            )
        if self.requested():
            return
        pairs = list(zip(self.questions, got, strict=True))
        correct = sum(exact(question.expected, text) for question, text in pairs)
        self.figures["exact_match_before" if at_step == 0 else "exact_match"] = correct / len(pairs)
        self.emit(
            "generation",
            step=at_step,
            exact_match=correct / len(pairs),
            rows=len(pairs),
            correct=correct,
            seconds=time.perf_counter() - started,
            samples=[{"prompt": q.prompt, "expected": q.expected, "got": text} for q, text in pairs[:SAMPLES]],
        )
