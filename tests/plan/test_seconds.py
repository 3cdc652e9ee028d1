"""A step's seconds follow from its operations, what it moves, and what of that the schedule hides."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.plan.seconds import time_of
from qlora.plan.types import PHASES, Phase, Rates, Usage

CARD = Rates(flops=100.0, memory=10.0, bus=2.0, disk=1.0, host_memory=5.0, launch=0.5)
WAYS = ("host to device", "device to host", "from file", "to file")


def usage_of(**phases: Phase) -> Usage:
    return Usage({}, {}, {}, "", 0, phases, tokens=1, layers=1)


def phase_of(work=(), host_work=(), **moved) -> Phase:
    ways = {"h2d": "host to device", "d2h": "device to host", "read": "from file", "write": "to file"}
    return Phase(Counter(dict(work)), Counter(dict(host_work)), Counter({ways[k]: n for k, n in moved.items()}))


@pytest.mark.parametrize(
    ("phase", "seconds", "limit"),
    [
        (phase_of({(300, 10): 2}), 6, "compute"),
        (phase_of({(100, 40): 3}), 12, "memory"),
        (phase_of({(1, 1): 8}), 4, "memory"),  # launches
        (phase_of({(300, 0): 1, (0, 40): 1}), 7, "memory"),
        (phase_of({(500, 0): 1, (0, 40): 1}), 9, "compute"),
        (phase_of({(300, 0): 1}, h2d=6, d2h=6), 3, "compute"),  # both ways at once, both hidden
        (phase_of({(300, 0): 1}, h2d=7, d2h=6), 3.5, "bus"),
        (phase_of({(300, 0): 1}, h2d=6, d2h=8), 4, "bus"),
        (phase_of({(300, 0): 1}, h2d=4, read=4), 4, "disk"),
        (phase_of({(300, 0): 1}, read=2, write=3), 5, "disk"),  # one disk for both
        (phase_of({(300, 0): 1}, {(0, 20): 1}), 7, "host"),
        (phase_of({(300, 0): 1}, {(0, 5): 1}, h2d=8), 4, "compute"),
        (phase_of(), 0, "memory"),
    ],
)
def test_a_phase_takes_as_long_as_the_slowest_of_what_runs_at_once(phase, seconds, limit):
    time = time_of(usage_of(forward=phase), CARD)
    assert time.by_phase == {"forward": pytest.approx(seconds)}
    assert time.limit == {"forward": limit}


def test_nothing_is_hidden_in_the_prologue_and_in_the_optimizer():
    phase = phase_of({(0, 30): 1}, {(7, 10): 2}, h2d=1, d2h=1, read=1)
    time = time_of(usage_of(prologue=phase, optimizer=phase), CARD)
    assert time.by_phase == pytest.approx({"prologue": 3 + 4 + 1 + 1, "optimizer": 9})
    assert time.limit == {"prologue": "host", "optimizer": "host"}
    assert time_of(usage_of(optimizer=phase_of(d2h=9)), CARD).limit["optimizer"] == "bus"


def test_a_machine_that_is_its_own_device_has_no_bus():
    phase = phase_of({(100, 0): 1}, h2d=10**15, d2h=10**15)
    assert time_of(usage_of(forward=phase), Rates(flops=100, memory=10)).seconds == 1


works = st.dictionaries(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), st.integers(1, 50), max_size=4)
phases = st.builds(
    lambda work, host, moved: Phase(Counter(work), Counter(host), Counter(moved)),
    works,
    works,
    st.dictionaries(st.sampled_from(WAYS), st.integers(0, 10**6)),
)
usages = st.dictionaries(st.sampled_from(PHASES), phases, min_size=1).map(lambda found: usage_of(**found))
speeds = st.floats(1.0, 1e6)
rates = st.builds(Rates, speeds, speeds, speeds, speeds, speeds, st.floats(0, 1e-3))


@given(usages, rates, st.sampled_from(["flops", "memory", "bus", "disk", "host_memory"]), st.floats(1, 10))
def test_what_is_faster_never_makes_the_step_slower(usage, card, which, factor):
    faster = replace(card, **{which: getattr(card, which) * factor})
    before, after = time_of(usage, card), time_of(usage, faster)
    for phase, seconds in after.by_phase.items():
        assert seconds <= before.by_phase[phase] * (1 + 1e-9)
        assert seconds >= before.by_phase[phase] / factor * (1 - 1e-9)  # no more than by its own speed


@given(usages, rates, st.floats(0.1, 10))
def test_a_machine_that_is_faster_in_all_is_faster_by_just_that(usage, card, factor):
    names = ("flops", "memory", "bus", "disk", "host_memory")
    faster = replace(card, **{n: getattr(card, n) * factor for n in names}, launch=card.launch / factor)
    assert time_of(usage, faster).seconds == pytest.approx(time_of(usage, card).seconds / factor)


@given(usages, rates, st.floats(0.1, 10))
def test_the_ratio_stretches_each_phase_and_changes_no_reason(usage, card, ratio):
    plain, stretched = time_of(usage, card), time_of(usage, card, ratio)
    assert stretched.by_phase == pytest.approx({phase: ratio * s for phase, s in plain.by_phase.items()})
    assert stretched.limit == plain.limit


@given(phases, rates, st.sampled_from(WAYS))
def test_a_phase_is_slower_with_what_it_waits_for_and_no_faster_with_what_it_hides(phase, card, way):
    def seconds(phase: Phase, **speeds: float) -> float:
        return time_of(usage_of(turn=phase), replace(card, **speeds)).seconds

    here, limit = seconds(phase), time_of(usage_of(turn=phase), card).limit["turn"]
    for what in ("bus", "disk"):
        if what != limit:
            assert seconds(phase, **{what: getattr(card, what) * 2}) == here
        elif here:
            assert seconds(phase, **{what: getattr(card, what) / 2}) == here * 2
    less = replace(phase, moved=Counter({**phase.moved, way: 0}))
    assert seconds(less) <= here
    if limit not in ("bus", "disk"):
        assert seconds(less) == here
