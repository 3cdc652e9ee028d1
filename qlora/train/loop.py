"""The loop around the step: clip, update, report, save, stop.

It knows neither files nor formats: micro-batches come from a function of the epoch, events go to a function, and the
held-out rows are somebody else's function too.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.config import TrainingConfig
from qlora.errors import MachineError, NonFiniteLossError
from qlora.machine import first_words, give_back_memory, is_out_of_memory, memory_gib
from qlora.model.batch import Batch
from qlora.train import checkpoint, optim
from qlora.train.checkpoint import Progress
from qlora.train.step import Step, StepResult

Epochs = Callable[[int], Sequence[Batch]]
Emit = Callable[..., Any]
Requested = Callable[[], bool]  # whether it was asked to stop


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which micro-batches each optimizer step takes.

    sizes         micro-batches of each epoch that is begun
    accumulation  micro-batches of a step; an epoch's last step takes what is left
    steps         optimizer steps of the run
    """

    sizes: tuple[int, ...]
    accumulation: int
    steps: int

    @classmethod
    def of(cls, training: TrainingConfig, epochs: Epochs) -> Schedule:
        """Count through as many epochs as the recipe asks for."""
        k, sizes, steps = training.gradient_accumulation_steps, [], 0
        for epoch in itertools.count():
            if training.max_steps > 0:
                if steps >= training.max_steps:
                    break
                share = 1.0
            else:
                share = min(1.0, training.num_train_epochs - epoch)
                if share <= 0:
                    break
            sizes.append(len(epochs(epoch)))
            # Rounded, as 1.1 - 1 is a little more than 0.1, and that little would be a step.
            steps += math.ceil(round(math.ceil(sizes[-1] / k) * share, 6))
        return cls(tuple(sizes), k, min(steps, training.max_steps) if training.max_steps > 0 else steps)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """For each step: its epoch, and the first and behind-last micro-batch in it."""
        taken = 0
        for epoch, size in enumerate(self.sizes):
            for first in range(0, size, self.accumulation):
                if taken == self.steps:
                    return
                yield epoch, first, min(first + self.accumulation, size)
                taken += 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. stopped: None where it came to its end, else why not."""

    progress: Progress
    losses: tuple[float, ...]
    stopped: str | None


class Loop:
    """Trains from where the run is to its end."""

    def __init__(
        self,
        step: Step,
        parameters: Mapping[str, nn.Parameter],
        epochs: Epochs,
        training: TrainingConfig,
        run: checkpoint.Run,
        emit: Emit,
        evaluate: Callable[[int], None] | None = None,
    ) -> None:
        """
        parameters  what is trained, by name
        epochs      epoch -> its micro-batches, on the host
        run         what its checkpoints are of
        emit        emit(kind, **fields) reports an event
        evaluate    evaluate(step) scores the held-out rows, where there are any
        """
        self.step, self.parameters, self.epochs, self.training = step, parameters, epochs, training
        self.about, self.emit, self.evaluate = run, emit, evaluate
        self.schedule = Schedule.of(training, epochs)
        self.device = step.device
        self.optimizer, self.scheduler = optim.build(
            training, parameters, self.schedule.steps, lambda text: emit("notice", text=text)
        )
        self.progress = Progress()
        self._saved: Path | None = None  # the last checkpoint

    def resume(self, found: checkpoint.Checkpoint) -> Progress:
        """Go back to a checkpoint. Raises CheckpointError."""
        self._saved, self.progress = found.path, checkpoint.load(found, self.parameters, self.optimizer)
        checkpoint.remove_older(found.path, self.training.save_total_limit)  # a save may have died before it did
        if self.progress.step > self.schedule.steps:
            self.emit("notice", text=f"{found.path.name} is past the {self.schedule.steps} steps of this run")
        for _ in range(min(self.progress.step, self.schedule.steps)):
            self.scheduler.step()
        return self.progress

    @property
    def saves(self) -> int:
        """How many checkpoints the steps that are left will write."""
        every, first, last = self.training.save_steps, self.progress.step, self.schedule.steps
        return sum(step == last or _due(every, step) for step in range(first + 1, last + 1))

    def run(self, requested: Requested = lambda: False) -> Outcome:
        """Take the steps that are left. Where it is requested to stop, it finishes the step, saves and returns.

        Raises NonFiniteLossError; the last checkpoint is then the one before. MachineError where a checkpoint cannot be
        written.
        """
        losses: list[float] = []
        for epoch, first, behind in itertools.islice(self.schedule, self.progress.step, None):
            losses.append(self._take(epoch, first, behind))
            step, last = self.progress.step, self.progress.step == self.schedule.steps
            save = last or _due(self.training.save_steps, step)
            if save:
                self._save()
            if self.evaluate and _due(self.training.eval_steps, step) and not last and not requested():
                self.evaluate(step)
            if requested():  # asked once, as the answer may change at any time
                if not save:
                    self._save()
                break
        stopped = "interrupted" if self.progress.step < self.schedule.steps else None
        return Outcome(self.progress, tuple(losses), stopped)

    def _take(self, epoch: int, first: int, behind: int) -> float:
        """One optimizer step; returns its loss."""
        started = time.perf_counter()
        all_of_epoch = self.epochs(epoch)
        batches = [all_of_epoch[i].to(self.device) for i in range(first, behind)]
        number = self.progress.step + 1
        result = self._compute(batches, number)
        learning_rate = self.scheduler.get_last_lr()[0]
        norm = self.update(result, batches, number)
        seconds = time.perf_counter() - started
        self.progress = replace(
            self.progress,
            step=number,
            tokens=self.progress.tokens + result.tokens,
            seconds=self.progress.seconds + seconds,
        )
        self.emit(
            "step",
            step=number,
            epoch=epoch + behind / self.schedule.sizes[epoch],
            loss=result.loss,
            learning_rate=learning_rate,
            grad_norm=norm,
            tokens=self.progress.tokens,
            supervised=result.supervised,
            step_seconds=seconds,
            tokens_per_second=result.tokens / seconds,
            memory_gib=memory_gib(self.device),
        )
        return result.loss

    def _compute(self, batches: Sequence[Batch], number: int) -> StepResult:
        """The step's gradients. Where the device has no memory left, again with less of it: see `Step.relieve`.

        Raises MachineError where nothing is left that could live elsewhere.
        """
        while True:
            try:
                return self.step(batches, number)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = first_words(error)
            # Not above: the exception holds what the step has had on the device.
            for parameter in self.parameters.values():
                parameter.grad = None
            give_back_memory(self.device)
            changed = self.step.relieve()
            if changed is None:
                raise MachineError(
                    f"step {number}: {said}; {self._to_go_on()}\n"
                    "  with less on the device: memory.embeddings: host, memory.adapters: host,"
                    " memory.layer_tile_tokens: 2048; or in a new run a smaller data.max_seq_length or lora.r"
                )
            self.emit("notice", text=f"step {number}: {said}; it is taken again with {changed}")

    def update(self, result: StepResult, batches: Sequence[Batch], number: int) -> float:
        """Clip the gradients, move the weights, forget the gradients; returns their norm. Raises NonFiniteLossError."""
        norm = self._clip(result, batches, number)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self, result: StepResult, batches: Sequence[Batch], number: int) -> float:
        """Scale the gradients to at most max_grad_norm; returns their norm before that."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        value = norm.item()
        if not math.isfinite(result.loss) or not math.isfinite(value):
            bad = [where for where, loss in zip(result.rows, result.losses, strict=True) if not math.isfinite(loss)]
            rows = [row for where in bad or result.rows for row in where]
            shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
            what = f"the loss is {result.loss}" if not math.isfinite(result.loss) else f"the gradient's norm is {value}"
            raise NonFiniteLossError(
                f"step {number}: {what}; no weight was changed by it; {self._to_go_on()}\n"
                f"  rows of this step: {shown}\n"
                "  try a lower training.learning_rate; or in a new run model.dtype: bfloat16, if it is float16"
            )
        if self.training.max_grad_norm > 0:
            with_grads = [p for p in self.parameters.values() if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(with_grads, self.training.max_grad_norm, norm)
        return value

    def _to_go_on(self) -> str:
        """From where a run that ends here can be resumed."""
        return f"--resume goes on from {self._saved.name}" if self._saved else "there is no checkpoint yet"

    def _save(self) -> None:
        started = time.perf_counter()
        directory, keep = Path(self.training.output_dir), self.training.save_total_limit
        self._saved = checkpoint.save(directory, self.progress, self.parameters, self.optimizer, self.about, keep)
        self.emit("checkpoint", step=self.progress.step, path=str(self._saved), seconds=time.perf_counter() - started)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


@contextmanager
def stop_requested() -> Iterator[Requested]:
    """Turn a first Ctrl-C, SIGTERM or SIGHUP into an answer; a second Ctrl-C interrupts at once, as ever.

    SIGHUP stays ignored where this process was told to ignore it, as by nohup.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield asked.is_set
        return

    def note(signum: int, frame: Any) -> None:
        if signum == signal.SIGINT:
            if asked.is_set():
                signal.default_int_handler(signum, frame)
            # Past all buffers and locks, as this may come in the middle of a print.
            with suppress(OSError):
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
        asked.set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
