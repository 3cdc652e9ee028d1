"""What was measured, as it is written down: one JSON file for a run, which tables, pages and comparisons are made of.

Every raw figure is kept; what follows from them (medians, shares) is computed from the file when somebody asks.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora.errors import DataError
from qlora.redact import redacted

VERSION = 1
Status = Literal["ok", "out of memory", "late", "failed", "not installed", "not tried"]


class Written(BaseModel):
    """A part of the file."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), ser_json_inf_nan="constants")


class StepTaken(Written):
    """One optimizer step, seconds by what it spent them on; they sum to `seconds`, which is what the clock says.

    compute    forward and backward
    weights    the computation stood still because a layer's weights were not there
    data       micro-batches on their way to the device
    optimizer  clipping, update
    joules     that the card took; None: it does not say
    """

    seconds: float
    compute: float
    weights: float
    data: float
    optimizer: float
    loss: float
    joules: float | None = None


class Loaded(Written):
    """A method's process before its first step. GiB; `device_*` are None on the CPU."""

    seconds: float
    parameters: int
    trained: int
    host_peak_gib: float
    device_gib: float | None = None
    device_peak_gib: float | None = None
    facts: dict[str, Any] = {}  # what the method says of itself: versions, tiers, order


class Peaks(Written):
    """The most that a step held, the load aside. GiB.

    tensors      of live storages on the device, at one time; on the CPU, in host memory
    by_category  of those, by what they are for, where the method is ours
    allocated    torch's allocator; None on the CPU
    reserved     torch's allocator; None on the CPU
    host         resident set of the process; `host_told_apart` False: with the load's peak in it
    """

    tensors: float | None = None
    by_category: dict[str, float] = {}
    allocated: float | None = None
    reserved: float | None = None
    host: float
    host_told_apart: bool = True


class Predicted(Written):
    """What `qlora plan` says of the same step, before it is taken. reserved: with the allocator's slack."""

    allocated: float
    reserved: float
    seconds: float


class Trial(Written):
    """One try of a search."""

    tokens: int
    status: Status
    seconds: float | None = None


class Row(Written):
    """One method at one work.

    flops        of a step as it was computed, recomputing included; None: not counted
    model_flops  of a step that computes nothing twice; None: not known
    trials       of a search for the longest context, whose result `tokens` is
    """

    name: str
    method: str
    model: str
    is_shape: bool
    r: int
    optim: str
    vram: float | None
    memory: dict[str, Any] = {}
    k: int
    rows: int
    tokens: int
    status: Status
    error: str | None = None
    traceback: str | None = None
    loaded: Loaded | None = None
    warm_up: list[StepTaken] = []  # first steps, the counted one last
    steps: list[StepTaken] = []
    peaks: Peaks | None = None
    flops: float | None = None
    model_flops: float | None = None
    predicted: Predicted | None = None
    trials: list[Trial] = []

    @property
    def tokens_per_step(self) -> int:
        """Of all micro-batches."""
        return self.k * self.rows * self.tokens

    @property
    def work(self) -> str:
        """For people: `8 x 128`."""
        return f"{self.k} x {self.tokens}" if self.rows == 1 else f"{self.k} x {self.rows} x {self.tokens}"

    @property
    def losses(self) -> list[float]:
        """Of every step from the first."""
        return [step.loss for step in [*self.warm_up, *self.steps]]

    @property
    def tokens_per_second(self) -> Spread | None:
        """Over the timed steps; None: there are none."""
        return spread([self.tokens_per_step / step.seconds for step in self.steps])

    @property
    def memory_gib(self) -> float | None:
        """What is compared: VRAM allocated, on the CPU live tensors."""
        return None if self.peaks is None else self.peaks.allocated or self.peaks.tensors

    @property
    def group(self) -> tuple[Any, ...]:
        """What rows share that are compared with one another: all but the method."""
        return self.model, self.r, self.vram, self.k, self.rows, self.tokens


class Agreement(Written):
    """Whether methods that do the same computed the same losses.

    base        "4-bit" or "16-bit": what the compared methods train on
    first       largest relative difference of the losses before the first update, from the first method's
    later       the same of the steps behind it
    """

    model: str
    work: str
    r: int
    vram: float | None
    base: str
    methods: list[str]
    first: float
    later: float
    agree: bool


class Results(Written):
    """One run of a suite.

    suite       its name
    settings    the suite as it was run
    environment hardware, driver, versions, commit, command, load average; see `environment.surroundings`
    ceiling     FLOP/s of bf16 matrix products, as measured on this machine before anything else; None: it was not
    in_turn     methods took turns, step by step; False: not all of them fitted on the device at one time
    complete    False: the run was interrupted, what it had measured is here
    """

    version: int = VERSION
    suite: str
    title: str
    date: str
    device: str
    device_name: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    ceiling: float | None
    rows: list[Row] = []
    agreements: list[Agreement] = []
    in_turn: bool = True
    complete: bool = False

    def write(self, path: Path) -> None:
        """Replace a file by this: whole, or not at all, and without secrets that came with a command or an error."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        told = Results.model_validate(redacted(self.model_dump()))
        partial.write_text(told.model_dump_json(indent=1, exclude_defaults=True) + "\n")
        partial.replace(path)


def read(path: Path) -> Results:
    """A file that `write` left. Raises DataError."""
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"])
        raise DataError(f"{path}: is not a result of `qlora bench`: {where}: {found['msg']}") from None


class Spread(Written):
    """Median, 20th and 80th percentile of some figures."""

    median: float
    p20: float
    p80: float

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 1 if self.median >= 10 else 2
        return f"{self.median:,.{digits}f} ({self.p20:,.{digits}f} to {self.p80:,.{digits}f})"


def spread(values: Sequence[float]) -> Spread | None:
    """Of any number of figures; None of none."""
    if not values:
        return None
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else list(values) * 4
    return Spread(median=statistics.median(values), p20=fifths[0], p80=fifths[3])


def ratio(row: Row, of: Row) -> Spread | None:
    """Tokens a second of `row` as multiples of those of `of`, step by step as they took turns; None: not comparable."""
    pairs = zip(row.steps, of.steps, strict=False)
    return spread([(row.tokens_per_step / a.seconds) / (of.tokens_per_step / b.seconds) for a, b in pairs])


def is_noise(ratio: Spread) -> bool:
    """Whether a difference in speed is smaller than its own spread."""
    return ratio.p20 <= 1 <= ratio.p80
