"""The choice: of all ways to run, the fastest that fits.

A way to run is a value for each knob. Knobs are of two kinds, because asking what a choice takes costs half a second
where the step must be simulated for it, and microseconds where only other layers are placed somewhere:

    placement  PLACEMENT: how many layers stay on the device, keep their activations there (and are not computed
               again), and lie in host memory, of those not on the device. What is left is read from a file.
    dear       all others; the values of all of them are a setting

Branch and bound. For each setting the placement problem is first solved on a model that is cheap and never says too
much; settings are then simulated in the order of what that promises, until nothing promises more than what was found.
That model is `bound`, and what it says less than a setting that was simulated: of device memory than a leaner one, of
seconds than a simpler one.

What is relied on, beside that bound(choice) is nowhere above evaluate(choice):
    - a knob's values are ordered: everything else equal, a later one never takes more device memory and is never faster
    - fewer `layers_on_host` take no more host memory, and neither that nor `layers_kept` bears on the other's side
A later value of any other knob may take more host memory or disk.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import product
from typing import Any

from qlora.errors import MachineError
from qlora.machine import GIB

PLACEMENT: tuple[str, ...] = ("layers_on_device", "layers_kept", "layers_on_host")
TIE = 1e-3  # what differs by less in seconds is not told apart: then the simpler choice is taken

Choice = dict[str, Any]  # knob -> value
Setting = tuple[int, ...]  # of each dear knob the position of its value


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a choice takes: bytes on the device, in host memory, on disk; seconds of a step."""

    device: int
    host: int
    file: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that may be taken. file: None where it is not known."""

    device: int
    host: int
    file: int | None = None

    def over(self, estimate: Estimate) -> dict[str, int]:
        """By how many bytes each budget is exceeded; empty: it fits."""
        limits: dict[str, Any] = {
            "device": self.device,
            "host": self.host,
            "file": math.inf if self.file is None else self.file,
        }
        return {what: getattr(estimate, what) - n for what, n in limits.items() if getattr(estimate, what) > n}

    def excess(self, candidate: Candidate) -> float:
        """What it exceeds the budgets by, as parts of them, summed."""
        return sum(n / max(getattr(self, what), 1) for what, n in self.over(candidate.estimate).items())


@dataclass(frozen=True, slots=True)
class Space:
    """What may be chosen.

    knobs  knob -> its values, from the simplest, which takes most device memory, to the leanest; one where it is fixed
    """

    knobs: Mapping[str, tuple[Any, ...]]

    @property
    def dear(self) -> dict[str, tuple[Any, ...]]:
        """The knobs that are not placements."""
        return {knob: values for knob, values in self.knobs.items() if knob not in PLACEMENT}

    @property
    def settings(self) -> Iterator[Setting]:
        return product(*(range(len(values)) for values in self.dear.values()))

    def choice(self, setting: Setting, placement: Mapping[str, Any]) -> Choice:
        """With the layers placed so."""
        dear = {knob: values[at] for (knob, values), at in zip(self.dear.items(), setting, strict=True)}
        return {**dear, **placement}

    def setting(self, choice: Choice) -> Setting:
        """Of a choice."""
        return tuple(values.index(choice[knob]) for knob, values in self.dear.items())


@dataclass(frozen=True, slots=True)
class Candidate:
    """A choice, and what it takes."""

    choice: Choice
    estimate: Estimate


Model = Callable[[Choice], Estimate]


@dataclass(frozen=True, slots=True)
class Solution:
    """What was found.

    best        the fastest that fits; within TIE of it the one with the earliest values
    runners_up  up to three others, the fastest first, each with other values of the dear knobs
    evaluated   settings that were simulated
    proven      whether all others are known to be no faster; else `most` ended the search
    """

    best: Candidate
    runners_up: tuple[Candidate, ...]
    evaluated: int
    proven: bool


class NothingFits(MachineError):
    """No choice fits. `candidate` comes closest of those looked at; `over` says by how many bytes, by budget."""

    def __init__(self, candidate: Candidate, over: dict[str, int]) -> None:
        super().__init__(candidate, over)
        self.candidate, self.over = candidate, over

    def __str__(self) -> str:
        return "nothing fits: " + ", ".join(f"{n / GIB:.2f} GiB too much for {what}" for what, n in self.over.items())


def solve(space: Space, evaluate: Model, bound: Model, budget: Budget, most: int | None = None) -> Solution:
    """The fastest choice that fits.

    evaluate  what a choice takes: for a new setting dear
    bound     no more than that, of anything, and cheap; it is worth the more, the better it knows what placements take
    most      settings that may be evaluated once something was found; None: as many as it takes

    Raises NothingFits.
    """
    fastest_placement = {knob: space.knobs[knob][0] for knob in PLACEMENT if knob in space.knobs}
    queue: list[tuple[float, int, Setting, Any]] = [  # promised seconds, how far from simple, setting, what was known
        (bound(space.choice(s, fastest_placement)).seconds, sum(s), s, None) for s in space.settings
    ]
    heapify(queue)
    found: list[Candidate] = []
    simulated: list[Setting] = []
    fastest, simplest, proven = math.inf, math.inf, True
    while queue:
        seconds, moved, setting, seen = heappop(queue)
        if seconds > fastest * (1 + TIE):
            break
        if seconds >= fastest and moved >= simplest:
            continue
        known = _nearest(setting, simulated)
        if seen != known:  # more is known of it than when it was queued
            ways = _Placements(space, setting, _at_least(space, bound, evaluate, *known)).fitting(budget, fastest)
            promise = min((way.estimate.seconds for way in ways), default=math.inf)
            if promise < math.inf:
                heappush(queue, (max(promise, seconds), moved, setting, known))
            continue
        if found and most is not None and len(simulated) >= most:
            proven = False
            break
        simulated.append(setting)
        found += _Placements(space, setting, evaluate).fitting(budget)
        if found:
            best = _simplest(space, found)
            fastest, simplest = min(c.estimate.seconds for c in found), sum(space.setting(best.choice))
    if not found:
        raise _nothing_fits(space, evaluate, bound, budget, simulated)
    best = _simplest(space, found)
    others = {s: [c for c in found if space.setting(c.choice) == s] for s in simulated}
    others.pop(space.setting(best.choice))
    runners_up = sorted((_simplest(space, each) for each in others.values() if each), key=lambda c: c.estimate.seconds)
    return Solution(best, tuple(runners_up[:3]), len(simulated), proven)


def prices(space: Space, best: Candidate, evaluate: Model, most: int | None = None) -> dict[str, Candidate]:
    """For each knob that can be leaner: the best choice with its next leaner value, and nothing else changed.

    most  settings that may be evaluated for it, in the order of the knobs; placements do not count
    """
    found: dict[str, Candidate] = {}
    for knob, values in space.knobs.items():
        at = values.index(best.choice[knob]) + 1
        if at < len(values) and (knob in PLACEMENT or most is None or most > 0):
            most = most if most is None or knob in PLACEMENT else most - 1
            choice = best.choice | {knob: values[at]}
            found[knob] = Candidate(choice, evaluate(choice))
    return found


def _nearest(setting: Setting, simulated: Iterable[Setting]) -> tuple[Setting | None, Setting | None]:
    """Of what was simulated: what is nowhere less lean than `setting`, and what is nowhere leaner; the nearest each."""
    leaner = [s for s in simulated if all(a >= b for a, b in zip(s, setting, strict=True))]
    simpler = [s for s in simulated if all(a <= b for a, b in zip(s, setting, strict=True))]
    return min(leaner, key=sum, default=None), max(simpler, key=sum, default=None)


def _at_least(space: Space, bound: Model, evaluate: Model, leaner: Setting | None, simpler: Setting | None) -> Model:
    """`bound`, but no less device memory than the leaner setting takes, and no less time than the simpler one."""
    below = None if leaner is None else space.choice(leaner, {})
    above = None if simpler is None else space.choice(simpler, {})

    def model(choice: Choice) -> Estimate:
        low = bound(choice)
        device = 0 if below is None else evaluate({**choice, **below}).device
        seconds = 0.0 if above is None else evaluate({**choice, **above}).seconds
        return Estimate(max(low.device, device), low.host, low.file, max(low.seconds, seconds))

    return model


class _Placements:
    """The ways to place the layers in one setting, and what a model says of them."""

    def __init__(self, space: Space, setting: Setting, model: Model) -> None:
        self._dear, self._model = space.choice(setting, {}), model
        self._present = [knob for knob in PLACEMENT if knob in space.knobs]
        self.on_device, self.kept, self.on_host = (space.knobs.get(knob, (None,)) for knob in PLACEMENT)

    def at(self, d: Any, k: Any, h: Any) -> Candidate:
        values = dict(zip(PLACEMENT, (d, k, h), strict=True))
        choice = {**self._dear, **{knob: values[knob] for knob in self._present}}
        return Candidate(choice, self._model(choice))

    def filled(self, d: Any, k: Any, budget: Budget) -> Candidate:
        """With as many layers on the host as fit there; the fewest if none of the numbers does."""
        return self.at(d, k, _first(self.on_host, lambda h: self.at(d, k, h).estimate.host <= budget.host))

    def fitting(self, budget: Budget, fastest: float = math.inf) -> Iterator[Candidate]:
        """Those that fit and may be faster than `fastest` seconds: for each number of layers on the device, one."""

        def fits(d: Any, k: Any) -> bool:
            return self.at(d, k, self.on_host[-1]).estimate.device <= budget.device

        kept = self.kept
        start = self.on_device.index(_first(self.on_device, lambda d: fits(d, kept[-1])))
        for d in self.on_device[start:]:
            if self.at(d, kept[0], self.on_host[0]).estimate.seconds > fastest * (1 + TIE):
                break  # with fewer on the device it is no faster
            candidate = self.filled(d, _first(kept, lambda k, d=d: fits(d, k)), budget)
            if not budget.over(candidate.estimate):
                fastest = min(fastest, candidate.estimate.seconds)
                yield candidate

    def closest(self, budget: Budget) -> Candidate:
        """The one that exceeds the budget least, as parts of it."""
        return min((self.filled(d, self.kept[-1], budget) for d in self.on_device), key=budget.excess)


def _first(values: Sequence[Any], fits: Callable[[Any], bool]) -> Any:
    """The first that fits, where all behind one that fits do; the last if none does."""
    last = len(values) - 1
    return values[0] if fits(values[0]) else values[bisect_left(values, True, min(1, last), last, key=fits)]


def _simplest(space: Space, found: list[Candidate]) -> Candidate:
    limit = min(c.estimate.seconds for c in found) * (1 + TIE)

    def order(candidate: Candidate) -> tuple[float, ...]:
        placed = sum(space.knobs[k].index(candidate.choice[k]) for k in PLACEMENT if k in space.knobs)
        return sum(space.setting(candidate.choice)), placed, candidate.estimate.seconds

    return min((c for c in found if c.estimate.seconds <= limit), key=order)


def _nothing_fits(space: Space, evaluate: Model, bound: Model, budget: Budget, simulated: list[Setting]) -> NothingFits:
    """What comes closest: of the settings simulated, of the leanest, of the one that comes closest by its bound."""
    promising = min(space.settings, key=lambda s: budget.excess(_Placements(space, s, bound).closest(budget)))
    leanest = tuple(len(values) - 1 for values in space.dear.values())
    settings = {*simulated, leanest, promising}
    candidate = min((_Placements(space, s, evaluate).closest(budget) for s in settings), key=budget.excess)
    return NothingFits(candidate, budget.over(candidate.estimate))
