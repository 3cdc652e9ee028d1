"""The parent of a benchmark: processes that take turns, rows that come of them, and a file that has them all.

    for each group of setups that differ in the method alone:
        start a process for each             on a GPU that has not room for all of them, one after the other
        for each work: A B A B ...           a machine that drifts is slow to all
        a row each, losses compared          the file is written after every one

What goes wrong in a process is its row: it ran out of memory, failed, was late. The others go on.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from qlora.bench import peers
from qlora.bench.apart import apart
from qlora.bench.environment import accelerator, surroundings, today
from qlora.bench.meters import Counted
from qlora.bench.methods import as_directory
from qlora.bench.predictions import predictions
from qlora.bench.results import Agreement, Loaded, Peaks, Predicted, Results, Row, Status, StepTaken, Trial
from qlora.bench.work import OURS, PEERS, Method, Setup, Suite, Work
from qlora.bench.worker import Failure, Order, run
from qlora.errors import MachineError
from qlora.machine import GIB, device_name, free_bytes
from qlora.plan import measure
from qlora.plan.types import Rates

Say = Callable[[str], None]

CONTEXT_GIB = 1.0  # that a process takes of a GPU beside what its allocator holds
CEILING_S = 2.0  # seconds in which the machine shows how fast it multiplies
# Relative. Before the first update B is zero, so both sides round the same products and were seen 7e-8 apart; a kernel
# that rounds elsewhere moves a token's logit by up to 2^-9, and a thousand tokens average out. One token more or less
# in the denominator of 512 is caught.
FIRST = 2**-10
# Behind it bf16 rounds in other places, and Adam's first steps are of full length however small a gradient is.
LATER = 2e-2
BASES: dict[str, tuple[Method, ...]] = {"4-bit": ("qlora", "hf-qlora"), "16-bit": ("lora", "hf-lora", "full")}
EIGHTH = 8  # a longest context is found to an eighth of itself


def run_suite(
    name: str, suite: Suite, device: torch.device, place: Callable[[Results], Path], directory: Path, say: Say
) -> Results:
    """Measure all of a suite.

    place      gives the file that has, at any time, what was measured so far
    directory  for what methods leave for the next run: caches, converted models
    say        is told of every step in a line

    Raises MachineError where the suite cannot be run here, ModelError.
    """
    here = suite.device == "any" or device.type != "cpu"
    if suite.vram and suite.device == "any" and device.type == "cpu":
        raise MachineError(f"{name}: `vram` caps what a process takes of a GPU, and there is none here\n  leave it out")
    environment = surroundings()
    found = _in_a_process(probe, device) if here else None
    results = Results(
        suite=name,
        title=suite.title,
        date=today(),
        device=device.type,
        device_name=found.name if found else device_name(device),
        settings=suite.model_dump(mode="json"),
        environment=environment | (found.facts if found else {}),
        ceiling=found.rates.flops if found else None,
        complete=found is None,
    )
    if found is None:
        say(f"{name}: needs a GPU, and there is none here: nothing was measured")
        return results
    say(f"{found.name} multiplies at {found.rates.flops / 1e12:.2f} TFLOP/s")
    directory.mkdir(parents=True, exist_ok=True)
    suite = suite.model_copy(update={"model": [as_directory(model, say) for model in suite.model]})
    groups = list(suite.groups(device.type))
    predicted = _predictions(suite, groups, found.rates, say) if suite.predict else {}
    bench = _Bench(suite, results, place(results), directory, say, found.free / GIB, predicted, {})
    bench.write()
    for group in groups:
        bench.measure(group)
    results.complete = True
    bench.write()
    return results


class Found(NamedTuple):
    """The machine. free: bytes of the device; rates: what it does, flops as reached in CEILING_S; facts: of a GPU."""

    name: str
    free: int
    rates: Rates
    facts: dict[str, Any]


def probe(device: torch.device) -> Found:
    """To be asked in a process that ends: on a GPU what a process holds is missing to all others."""
    free = free_bytes(device)
    rates = measure.recall(measure.key_of(device), lambda text: None) or measure.quick(device)
    rates = replace(rates, flops=measure.multiplying(device, CEILING_S))
    return Found(device_name(device), free, rates, accelerator(device))


def _in_a_process(function: Callable[[torch.device], Found], device: torch.device) -> Found:
    with apart() as process:
        return process.submit(function, device).result()


def _predictions(suite: Suite, groups: Sequence[Sequence[Setup]], rates: Rates, say: Say) -> dict[Any, Any]:
    if suite.search or suite.recipe:
        say("predictions are for steps whose size is known: there are none for a search, or for rows of a recipe")
        return {}
    ours = [setup for group in groups for setup in group if setup.method in OURS]
    pairs = [(setup, work) for setup in ours for work in suite.works]
    say(f"steps to predict: {len(pairs)}")
    return predictions(pairs, rates, max(1, (os.cpu_count() or 1) // 2))


class Side:
    """A setup in its process, which has so many seconds of its own."""

    def __init__(self, setup: Setup, directory: Path, limit_s: float) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would have this process's memory, and no CUDA
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=run, args=(there, setup, directory), daemon=True)
        self._process.start()
        there.close()
        self._limit_s = self._left = limit_s
        said = self._hear()
        self.failure = said if isinstance(said, Failure) else None
        self.loaded = said if isinstance(said, Loaded) else None
        if self.failure is not None:
            self.close()

    @property
    def is_hopeless(self) -> bool:
        """Whether another try would fail too: it did not get as far as to its work, and not for want of memory."""
        return self.loaded is None and self.failure is not None and self.failure.status != "out of memory"

    def ask(self, work: Work, kind: str) -> Any:
        """What the process answers to an order; None where it failed, now or before."""
        if self.failure is not None:
            return None
        with suppress(OSError):  # where it is gone, what follows says how
            self._pipe.send(Order(work, cast(Any, kind)))
        said = self._hear()
        if isinstance(said, Failure):
            self.failure = said
            self.close()
            return None
        return said

    def _hear(self) -> Any:
        started = time.monotonic()
        try:
            if not self._pipe.poll(max(0.0, self._left)):
                return Failure("late", f"was not done within {self._limit_s:g} s")
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            killed = code is not None and code == -9  # by the system, which had no memory left, or by somebody
            return Failure("out of memory" if killed else "failed", f"its process ended with status {code}")
        finally:
            self._left -= time.monotonic() - started

    def close(self) -> None:
        """Let the process end, and its memory be free."""
        if self.failure is None:
            with suppress(OSError):
                self._pipe.send(None)
                self._process.join(60)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


@dataclass(slots=True)
class _Bench:
    """A suite on its way."""

    suite: Suite
    results: Results
    out: Path
    directory: Path
    say: Say
    free_gib: float
    predicted: dict[Any, Predicted | None]
    too_large: dict[tuple[str, int, float | None], str]  # in a search for the largest model: method -> the one that was

    def write(self) -> None:
        self.results.agreements = agreements(self.results.rows)
        self.results.write(self.out)

    def measure(self, group: list[Setup]) -> None:
        """All rows of a group."""
        ours = [setup for setup in group if setup.method not in PEERS]
        if self.suite.search == "context":
            for setup in ours:
                self._longest(setup)
        elif self.suite.search == "model":
            for setup in ours:
                self._fits(setup)
        else:
            together = self._have_room(ours)
            self.results.in_turn &= together
            for sides in [ours] if together else [[setup] for setup in ours]:
                self._in_turn(sides)
        for setup in group:
            for work in self.suite.works if setup.method in PEERS else ():
                steps = self.suite.warm_up, self.suite.steps, self.suite.limit_s
                self._note(peers.measure(setup, work, *steps, self.directory, self.say))

    def _have_room(self, setups: Sequence[Setup]) -> bool:
        """Whether the processes can live side by side. On a card each would see what the others leave."""
        if self.results.device == "cpu" or len(setups) == 1:
            return True
        caps = [setup.vram or math.inf for setup in setups]
        return sum(caps) + CONTEXT_GIB * len(caps) <= self.free_gib

    def _in_turn(self, setups: Sequence[Setup]) -> None:
        sides: dict[str, Side] = {}
        with ExitStack() as stack:
            stack.callback(lambda: [side.close() for side in sides.values()])
            for work in self.suite.works:
                taken = {setup.name: _Taken() for setup in setups}
                for setup in setups:
                    side = sides.get(setup.name)
                    if side is not None and setup.method == "full":  # its first weights are gone
                        side.close()
                        side = None
                    if side is None or (side.failure is not None and not side.is_hopeless):
                        sides[setup.name] = self._started(setup)
                for kind in ["step"] * self.suite.warm_up + ["count"] + ["step"] * self.suite.steps + ["peaks"]:
                    for setup in setups:
                        said = sides[setup.name].ask(work, kind)
                        taken[setup.name].add(said)
                        if kind != "peaks" and said is not None:
                            self._say_step(setup, work, said)
                rows = [self._row(setup, work, sides[setup.name], taken[setup.name]) for setup in setups]
                for row in rows:
                    self._note(_with_model_flops(row, rows))

    def _longest(self, setup: Setup) -> None:
        """The longest single sequence of which a step fits: doubled until one does not, then halved in between."""
        works = self.suite.works
        least, most = works[0].tokens, works[-1].tokens
        good, bad, tokens = 0, most + 1, least
        trials, side, best = list[Trial](), None, None
        unit = 1024 if least >= 1024 else 1  # what sequence lengths are multiples of, at these lengths
        try:
            while True:
                if side is None or side.failure is not None:  # who ran out of memory is not asked again
                    side = self._started(setup)
                    side.ask(Work(1, 1, min(least, 1024)), "step")  # the optimizer's state is there from then on
                work, taken = Work(1, 1, tokens), _Taken()
                for kind in ("step", "peaks"):
                    taken.add(side.ask(work, kind))
                row = self._row(setup, work, side, taken)
                seconds = row.steps[0].seconds if row.steps else None
                trials.append(Trial(tokens=tokens, status=row.status, seconds=seconds))
                self.say(f"{setup.title}: {work}: {row.error or f'{seconds:.1f} s'}")
                if row.status == "ok":
                    good, best = tokens, row
                else:
                    bad = tokens
                    best = best or row
                following = min(good * 2, most) if bad > most else (good + bad) // 2 // unit * unit
                near_enough = following <= good or bad - good <= good // EIGHTH
                if row.status in ("failed", "late") or not good or near_enough:
                    break
                tokens = following
        finally:
            if side is not None:
                side.close()
            if best is not None:  # of an interrupted search, as far as it came
                self._note(best.model_copy(update={"trials": trials}))

    def _fits(self, setup: Setup) -> None:
        """Whether a model trains at all, where no smaller one was too large already."""
        key, work = (setup.name, setup.r, setup.vram), self.suite.works[0]
        if key in self.too_large:
            row = _bare(setup, work, "not tried").model_copy(update={"error": f"{self.too_large[key]} was too large"})
            self._note(row)
            return
        side, taken = self._started(setup), _Taken()
        try:
            for kind in ["step"] * (1 + self.suite.steps) + ["peaks"]:
                taken.add(side.ask(work, kind))
            row = self._row(setup, work, side, taken, warm_up=1)
        finally:
            side.close()
        if row.status == "out of memory":
            self.too_large[key] = setup.model
        self._note(row)

    def _started(self, setup: Setup) -> Side:
        side = Side(setup, self.directory, self.suite.limit_s)
        seconds = f"loaded in {side.loaded.seconds:.1f} s" if side.loaded else side.failure and side.failure.error
        self.say(f"{setup.title}: {seconds}")
        return side

    def _say_step(self, setup: Setup, work: Work, said: StepTaken | Counted) -> None:
        took = "counted" if isinstance(said, Counted) else f"{said.seconds:.3f} s"
        self.say(f"{setup.title}: {work}: {took}")

    def _row(self, setup: Setup, work: Work, side: Side, taken: _Taken, warm_up: int | None = None) -> Row:
        """What the process did at a work; warm_up: its first steps that count as such."""
        if side.failure is not None:
            failure = side.failure
            row = _bare(setup, work, failure.status)
            found = {"error": failure.error, "traceback": failure.traceback if failure.status == "failed" else None}
            return row.model_copy(update={"loaded": side.loaded} | found)
        first = taken.before if warm_up is None else warm_up
        return _bare(setup, work, "ok").model_copy(
            update={
                "loaded": side.loaded,
                "warm_up": taken.steps[:first],
                "steps": taken.steps[first:],
                "peaks": taken.peaks,
                "flops": taken.counted and taken.counted.flops,
                "model_flops": taken.counted and taken.counted.model_flops,
                "predicted": self.predicted.get((setup.name, setup.model, setup.r, work)),
            }
        )

    def _note(self, row: Row) -> None:
        self.results.rows.append(row)
        if row.error:
            self.say(f"{row.name}: {row.work}: {row.status}: {row.error}")
        self.write()


class _Taken:
    """What a process answered at one work."""

    def __init__(self) -> None:
        self.steps: list[StepTaken] = []
        self.before = 0  # of them, the warm-up: up to the counted one
        self.counted: Counted | None = None
        self.peaks: Peaks | None = None

    def add(self, said: StepTaken | Counted | Peaks | None) -> None:
        if isinstance(said, StepTaken):
            self.steps.append(said)
        elif isinstance(said, Counted):
            self.steps.append(StepTaken(seconds=0, compute=0, weights=0, data=0, optimizer=0, loss=said.loss))
            self.before, self.counted = len(self.steps), said
        elif isinstance(said, Peaks):
            counted = self.counted
            also = {"tensors": counted.tensors, "by_category": counted.by_category} if counted else {}
            self.peaks = said.model_copy(update=also)


def _with_model_flops(row: Row, rows: Sequence[Row]) -> Row:
    """A stock method's from ours: what an adapter's step must compute is the same for all of them."""
    if row.model_flops is not None or row.status != "ok" or row.method == "full":
        return row
    known = [other.model_flops for other in rows if other.method in ("qlora", "lora") and other.model_flops]
    return row.model_copy(update={"model_flops": known[0] if known else None})


def _bare(setup: Setup, work: Work, status: Status) -> Row:
    return Row(
        name=setup.name,
        method=setup.method,
        model=setup.model,
        is_shape=setup.is_shape,
        r=setup.r,
        optim=setup.optim,
        vram=setup.vram,
        memory=dict(setup.memory),
        k=work.k,
        rows=work.rows,
        tokens=work.tokens,
        status=status,
    )


def agreements(rows: Iterable[Row]) -> list[Agreement]:
    """Whether methods on the same base computed the same losses, work by work. Full fine-tuning starts like LoRA on a
    16-bit base, whose adapter is a no-op at first, and goes its own way from there."""
    rows = [row for row in rows if row.status == "ok" and row.losses]
    found = []
    for group in dict.fromkeys(row.group for row in rows):
        for base, methods in BASES.items():
            same = [row for row in rows if row.group == group and row.method in methods]
            if len(same) < 2:
                continue
            of = same[0].losses
            first = max(_apart(row.losses[0], of[0]) for row in same[1:])
            adapters = [row for row in same if row.method != "full"]
            pairs = [pair for row in adapters[1:] for pair in zip(row.losses[1:], adapters[0].losses[1:], strict=False)]
            later = max((_apart(*pair) for pair in pairs), default=0.0)
            found.append(
                Agreement(
                    model=same[0].model,
                    work=same[0].work,
                    r=same[0].r,
                    vram=same[0].vram,
                    base=base,
                    methods=[row.name for row in same],
                    first=first,
                    later=later,
                    agree=first <= FIRST and later <= LATER,
                )
            )
    return found


def _apart(a: float, b: float) -> float:
    return abs(a - b) / abs(b) if math.isfinite(a) and math.isfinite(b) else math.inf
