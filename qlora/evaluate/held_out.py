"""How a model does on the held-out rows: the loss, and answers counted right or wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.config import TrainingConfig
from qlora.errors import HostMemoryError
from qlora.evaluate.generation import answer, evaluating, exact
from qlora.machine import first_words, free_bytes, give_back_memory, is_out_of_memory
from qlora.model.batch import Batch, Question

GROUP = 8  # micro-batches that pass through a layer together: more read each layer less often, and take more memory
SAMPLES = 3  # answers that are shown
_SHOWN = 16_000  # characters of each of their texts; a log's reader takes lines of 1 MiB

T = TypeVar("T")


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
    def relieve(self) -> str | None: ...


class HeldOut:
    """Scores the held-out rows whenever it is asked to, and keeps the last figures.

    No run is lost for them: where memory runs out they are scored with less of it, or else not, and that is said.
    """

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
        self._group, self._rows = GROUP, training.per_device_eval_batch_size

    def loss(self, at_step: int) -> None:
        """Mean loss over the supervised tokens, with dropout off; memory does not grow with the rows."""
        if not self.batches:
            return
        started, total, tokens, first = time.perf_counter(), 0.0, 0, 0
        with evaluating(self.model):
            while first < len(self.batches) and not self.requested():
                done = self._within_memory(partial(self._score, first), self._relieve, f"step {at_step}", "scored")
                if done is None:
                    self.figures.pop("eval_loss", None)  # an earlier one is not this model's
                    return
                first, scored = done
                total += scored.loss * scored.supervised
                tokens += scored.supervised
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
        got = self._within_memory(self._answer, self._halve, f"step {at_step}", "answered")
        if got is None or self.requested():
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
            samples=[
                {"prompt": _shown(q.prompt), "expected": _shown(q.expected), "got": _shown(text)}
                for q, text in pairs[:SAMPLES]
            ],
        )

    def _score(self, first: int) -> tuple[int, Scored]:
        """The micro-batches from `first` on that pass together, scored, and behind them the next one's number."""
        behind = min(first + self._group, len(self.batches))
        return behind, self.step.evaluate([self.batches[i].to(self.step.device) for i in range(first, behind)])

    def _answer(self) -> list[str]:
        # A generated token passes through every layer: it is worth to have them all dense, where they fit.
        with self.step.whole_model(free_bytes(self.step.device) / 2):
            return answer(
                self.model,
                self.step.device,
                self.tokenizer,
                [question.ids for question in self.questions],
                self.end_ids,
                self.training.generation_max_length,
                self._rows,
                self.requested,
            )

    def _within_memory(
        self, work: Callable[[], T], relieve: Callable[[], str | None], when: str, done: str
    ) -> T | None:
        """What the work gives. Where memory runs out, again after `relieve`; None where that has nothing left."""
        told = ""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError, HostMemoryError) as error:
                if not isinstance(error, HostMemoryError) and not is_out_of_memory(error):
                    raise
                said = first_words(error)
            # Not above: the exception holds what the work has had on the device.
            give_back_memory(self.step.device)
            changed = relieve()
            text = f"{when}: the held-out rows are not {done}: {said}"
            if changed is not None:
                text = f"{when}: {said}; the held-out rows are {done} with {changed}"
            if text != told:
                self.emit("notice", text=text)
            if changed is None:
                return None
            told = text

    def _relieve(self) -> str | None:
        if self._group > 1:  # costs this evaluation some speed, and the steps to come nothing
            self._group = 1
            return "one micro-batch at a time"
        try:
            return self.step.relieve()
        except HostMemoryError:
            return None

    def _halve(self) -> str | None:
        if self._rows == 1:
            return None
        self._rows //= 2
        return "fewer of them at a time"


def _shown(text: str) -> str:
    """A text to look at: of a long one the middle is left out."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}\n...\n{text[-_SHOWN // 2 :]}"
