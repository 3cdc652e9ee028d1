"""The choice fits, and nothing that fits is faster; found with few simulations."""

import math
import random
from dataclasses import dataclass, field, replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.plan.solve import PLACEMENT, TIE, Budget, Candidate, Choice, Estimate, NothingFits, Space, prices, solve


def fits(estimate: Estimate, budget: Budget) -> bool:
    on_disk = budget.file is None or estimate.file <= budget.file
    return estimate.device <= budget.device and estimate.host <= budget.host and on_disk


ROOM = Budget(10**9, 10**9)


@dataclass
class Toy:
    """A model of what choices take: tables for the dear knobs that add up, and layers that are placed.

    slack  by how much the bound is below it, as a part; placed: whether the bound knows where layers are
    """

    space: Space
    bytes_of: dict[str, tuple[int, ...]]
    host_of: dict[str, tuple[int, ...]]
    seconds_of: dict[str, tuple[float, ...]]
    layers: int
    layer: int = 10
    kept: int = 3
    base: int = 5
    compute: float = 10.0
    saved: float = 0.1
    bus: float = 0.05
    disk: float = 0.2
    slack: float = 0.0
    placed: bool = True
    simulated: set[tuple] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.dear = tuple(self.space.dear.items())

    def evaluate(self, choice: Choice) -> Estimate:
        self.simulated.add(self.space.setting(choice))
        return self.take(choice)

    def take(self, choice: Choice) -> Estimate:
        at = [(knob, values.index(choice[knob])) for knob, values in self.dear]
        here = choice.get("layers_on_device", self.layers)
        away = self.layers - here
        on_host = min(choice.get("layers_on_host", away), away)
        kept = choice.get("layers_kept", 0)
        device = self.base + sum(self.bytes_of[knob][i] for knob, i in at)
        device += here * self.layer + (self.layer if away else 0) + kept * self.kept
        host = sum(self.host_of[knob][i] for knob, i in at) + on_host * self.layer
        compute = self.compute + sum(self.seconds_of[knob][i] for knob, i in at) - kept * self.saved
        streamed = max(away * self.bus, (away - on_host) * self.disk)
        return Estimate(device, host, (away - on_host) * self.layer, max(compute, streamed))

    def bound(self, choice: Choice) -> Estimate:
        if not self.placed:
            leanest = {knob: self.space.knobs[knob][-1] for knob in PLACEMENT if knob in self.space.knobs}
            fastest = {knob: self.space.knobs[knob][0] for knob in PLACEMENT if knob in self.space.knobs}
            low = self.take(choice | leanest)
            low = Estimate(low.device, 0, 0, self.take(choice | fastest).seconds)
        else:
            low = self.take(choice)
        part = 1 - self.slack
        return Estimate(int(low.device * part), int(low.host * part), int(low.file * part), low.seconds * part)

    def everything(self) -> list[Candidate]:
        choices = (dict(zip(self.space.knobs, v, strict=True)) for v in product(*self.space.knobs.values()))
        return [Candidate(choice, self.take(choice)) for choice in choices]

    def solve(self, budget: Budget, **more):
        self.simulated.clear()
        return solve(self.space, self.evaluate, self.bound, budget, **more)


@st.composite
def toys(draw) -> Toy:
    layers = draw(st.integers(1, 4))
    knobs: dict[str, tuple] = {}
    tables: list[dict] = [{}, {}, {}]
    for knob in "abc"[: draw(st.integers(0, 3))]:
        n = draw(st.integers(1, 3))
        knobs[knob] = tuple(f"{knob}{i}" for i in range(n))
        numbers = st.lists(st.integers(0, 40), min_size=n, max_size=n)
        tables[0][knob] = tuple(sorted(draw(numbers), reverse=True))
        tables[1][knob] = tuple(draw(numbers))
        tables[2][knob] = tuple(n / 8 for n in sorted(draw(numbers)))
    for knob in PLACEMENT:
        values = tuple(range(layers, -1, -1))
        fixed = draw(st.integers(0, layers))
        kind = draw(st.sampled_from(["free", "free", "fixed", "absent"]))
        if kind != "absent":
            knobs[knob] = values if kind == "free" else (fixed,)
    parts = st.floats(0, 2)
    return Toy(
        Space(knobs),
        *tables,
        layers,
        layer=draw(st.integers(1, 30)),
        kept=draw(st.integers(0, 30)),
        saved=draw(parts),
        bus=draw(parts),
        disk=draw(parts),
        slack=draw(st.sampled_from([0, 0.1, 0.5])),
        placed=draw(st.booleans()),
    )


budgets = st.builds(Budget, st.integers(0, 250), st.integers(0, 120), st.none() | st.integers(0, 80))


@settings(deadline=None, max_examples=500)
@given(toys(), budgets)
def test_nothing_that_fits_is_faster(toy, budget):
    fitting = [c for c in toy.everything() if fits(c.estimate, budget)]
    try:
        solution = toy.solve(budget)
    except NothingFits as no:
        assert not fitting
        assert no.over == budget.over(toy.take(no.candidate.choice)) != {}
        return
    best = solution.best
    fastest = min(c.estimate.seconds for c in fitting)
    assert best.estimate == toy.take(best.choice) and fits(best.estimate, budget)
    assert fastest <= best.estimate.seconds <= fastest * (1 + TIE)
    assert best.choice.keys() == toy.space.knobs.keys()
    assert all(best.choice[knob] in values for knob, values in toy.space.knobs.items())
    assert solution.proven and solution.evaluated == len(toy.simulated)
    for knob, values in toy.space.knobs.items():  # each neighbour, and all others that differ in one knob
        for value in values:
            other = toy.take(best.choice | {knob: value})
            assert not fits(other, budget) or other.seconds * (1 + TIE) >= best.estimate.seconds
    for runner_up in solution.runners_up:
        assert runner_up.estimate == toy.take(runner_up.choice) and fits(runner_up.estimate, budget)
        assert runner_up.estimate.seconds >= fastest


@settings(deadline=None, max_examples=200)
@given(toys(), budgets)
def test_no_setting_is_simulated_whose_bound_is_beyond_what_was_found(toy, budget):
    try:
        found = toy.solve(budget).best.estimate.seconds
    except NothingFits:
        return
    for setting in toy.simulated:
        choices = [c.choice for c in toy.everything() if toy.space.setting(c.choice) == setting]
        bounds = [low.seconds for low in map(toy.bound, choices) if fits(low, budget)]
        assert min(bounds) <= found * (1 + TIE) ** 2


@settings(deadline=None, max_examples=200)
@given(toys(), budgets, st.sampled_from(["device", "host", "file"]))
def test_one_byte_less_than_the_choice_takes_changes_it(toy, budget, what):
    try:
        best = toy.solve(budget).best
    except NothingFits:
        return
    exact = Budget(best.estimate.device, best.estimate.host, best.estimate.file)
    assert toy.solve(exact).best.estimate.seconds <= best.estimate.seconds * (1 + TIE)
    less = replace(exact, **{what: getattr(exact, what) - 1})
    try:
        assert toy.solve(less).best.choice != best.choice
    except NothingFits as no:
        assert what in less.over(best.estimate) and no.over


def toy_of(knobs: dict[str, tuple], **tables) -> Toy:
    zeros = {knob: (0,) * len(values) for knob, values in knobs.items()}
    seconds = zeros | tables.pop("seconds_of", {})
    dear = {knob: tables.pop(knob) for knob in knobs if knob in tables}
    return Toy(Space(knobs), zeros | dear, zeros, seconds, **{"layers": 0, **tables})


def test_of_choices_that_take_as_long_the_simpler_is_taken():
    toy = toy_of({"a": (1, 2, 3)}, a=(30, 20, 10), seconds_of={"a": (0.0, 0.0, 0.0)})
    assert toy.solve(ROOM).best.choice == {"a": 1}
    assert toy.solve(Budget(5 + 29, 0)).best.choice == {"a": 2}


@pytest.mark.parametrize(
    ("longer", "chosen"), [(1.0005, {"a": 1, "layers_on_device": 0}), (1.002, {"a": 2, "layers_on_device": 4})]
)
def test_moving_more_must_gain_a_thousandth(longer, chosen):
    """On the device there is room for what knob a takes, and then 9 layers are streamed; or for 4 of the layers."""
    toy = toy_of({"a": (1, 2), "layers_on_device": (4, 0)}, a=(40, 0), layers=9, bus=longer / 9, compute=1.0)
    assert toy.solve(Budget(5 + 50, 1000)).best.choice == chosen


def test_a_knob_that_is_fixed_stays():
    toy = toy_of({"a": (1, 2), "b": (2,)}, a=(30, 0), b=(50,), seconds_of={"b": (9.0,)})
    assert toy.solve(ROOM).best.choice == {"a": 1, "b": 2}
    with pytest.raises(NothingFits) as no:
        toy.solve(Budget(54, 0))
    assert no.value.candidate.choice == {"a": 2, "b": 2}
    assert no.value.over == {"device": 1}
    assert "GiB too much for device" in str(no.value)


def test_what_comes_closest_is_named_when_nothing_fits():
    toy = toy_of({"a": (1, 2)}, a=(100, 0))
    toy.host_of = {"a": (0, 100)}
    with pytest.raises(NothingFits) as no:
        toy.solve(Budget(104, 10))  # 1 byte too much on the device, or 90 on the host
    assert no.value.candidate.choice == {"a": 1} and no.value.over == {"device": 1}


def test_memory_goes_to_kept_layers_or_to_layers_on_the_device_by_what_they_save():
    knobs = {knob: tuple(range(8, -1, -1)) for knob in PLACEMENT}
    toy = toy_of(knobs, layers=8, layer=10, kept=10, bus=0.0, saved=0.5)
    assert toy.solve(Budget(5 + 10 + 40, 1000)).best.choice["layers_kept"] == 4
    toy.saved, toy.bus, toy.disk, toy.compute = 0.001, 2.0, 4.0, 1.0
    assert toy.solve(Budget(5 + 10 + 40, 1000)).best.choice["layers_on_device"] == 4
    toy.disk = 40.0
    best = toy.solve(Budget(5 + 10 + 40, 20)).best  # 2 on the host, 2 on file
    assert best.choice["layers_on_host"] == 2 and best.estimate.seconds == 80


def test_prices_are_of_one_step_to_the_leaner_side():
    toy = toy_of({"a": (1, 2), "b": (1, 2, 3), "layers_on_device": (1, 0)}, a=(7, 0), layers=1, layer=10)
    best = toy.solve(ROOM).best
    found = prices(toy.space, best, toy.evaluate)
    assert found["a"].choice == best.choice | {"a": 2}
    assert found["a"].estimate.device == best.estimate.device - 7
    assert found["b"].choice["b"] == 2 and found["layers_on_device"].choice["layers_on_device"] == 0
    assert prices(toy.space, best, toy.evaluate, most=1).keys() == {"a", "layers_on_device"}


def test_the_search_stops_where_the_caller_says():
    toy = realistic(random.Random(1), 0.1)
    toy.placed = False
    solution = toy.solve(Budget(12_000, 32_000), most=4)
    assert solution.evaluated == 4 and not solution.proven
    assert fits(solution.best.estimate, Budget(12_000, 32_000))


def realistic(dice: random.Random, slack: float) -> Toy:
    """Like an 8B to 70B model in MB, 288 settings."""
    knobs = {
        "micro_batch_tokens": (8192, 4096, 2048, 1024),
        "activations": ("device", "host", "file"),
        "embeddings": ("device", "host"),
        "adapters": ("device", "host"),
        "loss_chunk_tokens": (1024, 512, 256),
        "layer_tile_tokens": (None, 2048),
    }
    layers, tokens = dice.choice([32, 48, 80]), 16_384
    layer, hidden = dice.choice([110, 200, 440]), dice.choice([4096, 8192])
    boundaries = tokens * hidden * 2 * layers // 10**6
    adapters = dice.choice([340, 1300, 6000])
    compute = tokens * layers * layer * 2e6 * 8 / dice.choice([30e12, 70e12, 160e12])
    none = {knob: (0,) * len(values) for knob, values in knobs.items()}
    return Toy(
        Space(knobs | {knob: tuple(range(layers, -1, -1)) for knob in PLACEMENT}),
        none
        | {
            "micro_batch_tokens": tuple(n * hidden * 60 // 10**6 for n in knobs["micro_batch_tokens"]),
            "activations": (boundaries, 150, 150),
            "embeddings": (2 * 128_000 * hidden * 2 // 10**6, 300),
            "adapters": (adapters, adapters // layers),
            "loss_chunk_tokens": tuple(n * 128_000 * 6 // 10**6 for n in knobs["loss_chunk_tokens"]),
            "layer_tile_tokens": (600, 200),
        },
        none | {"activations": (0, boundaries, 300), "embeddings": (0, 2000), "adapters": (0, adapters)},
        {
            "micro_batch_tokens": tuple(compute * f for f in (0, 0.01, 0.03, 0.08)),
            "activations": (0, 0, compute * 0.02),
            "embeddings": (0, compute * 0.01),
            "adapters": (0, compute * 0.02),
            "loss_chunk_tokens": (0, compute * 0.002, compute * 0.006),
            "layer_tile_tokens": (0, compute * 0.04),
        },
        layers,
        layer=layer,
        kept=tokens * hidden * 24 // 10**6,
        compute=compute,
        saved=compute / layers / 5,
        bus=2 * layer / 22_000,
        disk=2 * layer / 5_000,
        slack=slack,
    )


BUDGETS = [Budget(device, 48_000, 400_000) for device in (12_000, 24_000)]


@pytest.mark.parametrize("seed", [0, 2])
def test_few_settings_are_simulated(seed):
    exact, vague = realistic(random.Random(seed), 0.0), realistic(random.Random(seed), 0.03)
    assert math.prod(len(values) for values in exact.space.dear.values()) == 288
    for budget in BUDGETS:
        best = exact.solve(budget)
        assert best.evaluated == 1  # a bound that says all finds it at once
        some = vague.solve(budget, most=12)
        assert some.evaluated <= 12
        assert some.best.estimate.seconds <= best.best.estimate.seconds * 1.005
    assert vague.solve(BUDGETS[0]).evaluated <= 30
