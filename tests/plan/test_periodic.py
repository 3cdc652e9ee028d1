"""A step that is put together from steps of a few layers is the step of the whole model, to the byte."""

import functools
import json
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoConfig

from qlora.config import Config
from qlora.model.store import tiers_of
from qlora.plan.ledger import ACCELERATOR, HOST
from qlora.plan.periodic import Pattern, Place, Simulator, fetched
from qlora.plan.simulate import BASE, simulate
from qlora.plan.types import Usage, Work
from tests.conftest import tiny_config

LARGER = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 1024}
SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
STREAMED = {"layers_on_device": 0, "activations": "host", "embeddings": "host", "adapters": "host"}
MIXED = {"layers_on_device": 3, "layers_on_host": 3, "activations": "file", "embeddings": "host", "adapters": "host"}
LORA = {"plain": {}, "dropout": {"lora_dropout": 0.1}, "ranks": {"rank_pattern": {"q_proj": 2}}}
exhaustive = pytest.mark.exhaustive


def config_of(memory, rows=1, k=4, tokens=32, packing=False, dtype="float32", lora="plain") -> Config:
    training = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": k, "optim": "adamw_torch"}
    return Config.model_validate(
        {
            "model": {"model_name_or_path": "unused", "dtype": dtype},
            "quantization": {"bnb_4bit_compute_dtype": dtype},
            "data": {"datasets": [{"path": "unused"}], "max_seq_length": tokens, "packing": packing},
            "lora": LORA[lora],
            "memory": {"micro_batch_tokens": 0} | memory,
            "training": training,
        }
    )


@functools.cache
def simulator(architecture="llama", layers=8, device=ACCELERATOR, **recipe) -> Simulator:
    """One for all tests of a recipe: what it simulated serves other `memory` sections too."""
    config = config_of({}, **recipe)
    shape = tiny_config(architecture, **LARGER | {"num_hidden_layers": layers})
    return Simulator(config, shape, config.data.max_seq_length, device)


def whole(of: Simulator, memory) -> Usage:
    """A step of the model with all its layers."""
    config = of.config.model_copy(update={"memory": memory})
    return simulate(config, of.model_config, of.micro_batches(memory), of.tokens, of.device)


def assert_equal(found: Usage, expected: Usage) -> None:
    """In every figure but the slack: that is how a real allocator's segments come to lie, and has no period."""
    for what in ("device", "host", "file", "moment", "tokens", "layers", "order", "flops"):
        assert getattr(found, what) == getattr(expected, what), what
    for name, phase in expected.phases.items():
        assert +found.phases[name].moved == +phase.moved, name
        assert not -found.phases[name].moved, name
        for kind in ("work", "host_work"):
            assert _summed(getattr(found.phases[name], kind)) == _summed(getattr(phase, kind)), (name, kind)


def _summed(work: Work) -> tuple[int, int, int]:
    """Operations, FLOPs, bytes. One operation over all weights has bytes of its own in a model of each depth."""
    return sum(work.values()), sum(f * n for (f, _), n in work.items()), sum(b * n for (_, b), n in work.items())


def check(memory, **recipe) -> None:
    of = simulator(**recipe)
    assert of.pattern is not None
    section = config_of(memory).memory
    assert_equal(of.usage(section), whole(of, section))


@pytest.mark.parametrize(
    "memory",
    [
        {},
        pytest.param({"layers_on_device": 4, "layers_on_host": 3, "activations": "file"}, marks=exhaustive),
        STREAMED,
        pytest.param(MIXED | {"vocabulary_chunk": 300}, marks=exhaustive),
        {"layers_kept": 4},
        {"layers_kept": 99, "activations": "host"},  # all
        pytest.param({"layers_kept": 1, "layers_on_device": 3, "loss_chunk_tokens": 16}, marks=exhaustive),
        {"micro_batch_tokens": 64, "loss_chunk_tokens": 16, "embeddings": "host"},
        pytest.param({"micro_batch_tokens": 96, "activations": "host"}, marks=exhaustive),  # 4 rows: a rest of one
        pytest.param({"layer_tile_tokens": 16, "layers_on_device": 5}, marks=exhaustive),
    ],
    ids=str,
)
def test_a_step_is_that_of_the_whole_model_to_the_byte(memory):
    check(memory)


@pytest.mark.parametrize(
    ("memory", "recipe"),
    [
        ({"activations": "file"}, {"k": 1}),
        ({"loss_chunk_tokens": 16, "embeddings": "host"}, {"k": 5}),  # an odd number, in pieces
        pytest.param({"layers_kept": 3, "adapters": "host"}, {"k": 5, "rows": 2}, marks=exhaustive),
        pytest.param({"micro_batch_tokens": 96, "layers_on_device": 0}, {"rows": 5, "k": 2}, marks=exhaustive),
        pytest.param({"layers_kept": 2, "layers_on_device": 3}, {"packing": True, "rows": 2, "k": 3}, marks=exhaustive),
        pytest.param({"layers_kept": 5, "activations": "host"}, {"lora": "dropout"}, marks=exhaustive),
        (MIXED | {"embeddings": "device", "layers_on_host": 0}, {"device": HOST}),
        pytest.param({"layers_kept": 3}, {"device": HOST, "rows": 2}, marks=exhaustive),
        ({"layers_on_device": 2}, {"architecture": "mixtral", "dtype": "bfloat16", "layers": 7}),
        pytest.param({"activations": "host"}, {"architecture": "gpt_neox"}, marks=exhaustive),
        pytest.param({"layers_kept": 3}, {"architecture": "mixtral", "dtype": "bfloat16"}, marks=exhaustive),
        pytest.param({"layers_on_device": 3}, {"architecture": "gemma3_text", "layers": 26}, marks=exhaustive),
        pytest.param({"layers_kept": 2}, {"architecture": "gemma2", "layers": 11}, marks=exhaustive),
        pytest.param({"layer_tile_tokens": 16}, {"packing": True, "rows": 2, "k": 4}, marks=exhaustive),
    ],
    ids=str,
)
def test_so_is_another_recipes_step(memory, recipe):
    check(memory, **recipe)


@exhaustive
def test_a_70b_step_is_put_together_to_the_byte_in_seconds(capsys):
    memory = {"layers_on_device": 20, "layers_on_host": 40, "activations": "host", "loss_chunk_tokens": 512}
    config = config_of(memory, tokens=512, k=1, dtype="bfloat16")
    shape = AutoConfig.for_model(**json.loads((SHAPES / "llama3.3-70b.json").read_text()))
    started = time.perf_counter()
    of = Simulator(config, shape, 512)
    found = of.usage(config.memory)
    seconds = time.perf_counter() - started
    with capsys.disabled():
        print(f"\n70B: {seconds:.1f} s in parts", end="", flush=True)
        expected = whole(of, config.memory)
        print(f", {time.perf_counter() - started - seconds:.0f} s as a whole")
    assert found.layers == 80 and seconds < 20
    assert_equal(found, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "gemma3_text", "layers": 4},  # every sixth layer is another
        {"layers": 4},
        {"lora": "ranks"},
    ],
    ids=str,
)
def test_a_model_whose_layers_do_not_repeat_is_simulated_whole(changes):
    of = simulator(**changes, k=1)
    assert of.pattern is None
    memory = config_of({"layers_on_device": 1}).memory
    assert_equal(of.usage(memory), whole(of, memory))


def test_so_is_a_model_that_keeps_a_part_of_a_period():
    of = simulator("gemma2", layers=9, k=1)
    assert of.pattern == Pattern(before=1, period=2, rest=0, layers=9)
    assert of.usage(config_of({"layers_kept": 1}).memory).layers == 9
    assert {layers for layers, *_ in of._records} == {9}


@pytest.mark.parametrize("memory", [{"layers_on_device": 4, "layers_on_host": 3}, STREAMED, MIXED], ids=str)
def test_what_is_fetched_is_what_a_step_that_fetches_moves(memory):
    of = simulator()
    section = config_of(memory | {"activations": "device", "adapters": "device", "embeddings": "device"}).memory
    found, usage = fetched(of.groups, tiers_of(of.groups, section), of.config), whole(of, section)
    assert (usage.file.get(BASE, 0) > 0) == (section.layers_on_host is not None)
    assert found == {name: +phase.moved for name, phase in usage.phases.items() if +phase.moved}


# Patterns


@given(st.lists(st.integers(0, 3), max_size=3), st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(5, 9))
def test_layers_that_repeat_are_recognized(prefix, period, times):
    kinds = prefix + period * times
    found = Pattern.of(kinds)
    assert found is not None and found.period <= len(period)
    assert found.depth(found.periods) == len(kinds)


@given(st.lists(st.integers(0, 1), max_size=24))
def test_a_pattern_that_is_found_tells_every_layer(kinds):
    found = Pattern.of(kinds)
    if found is None:
        return
    told = kinds[: found.before + found.period]
    while len(told) < len(kinds):
        told.append(told[-found.period])
    assert told == kinds and found.before >= 1 and found.periods >= 4 and 0 <= found.rest < found.period


@pytest.mark.parametrize("kinds", [[], [0], [0] * 4, [0, 1, 2, 3, 4, 5, 6, 7], [0, 1] * 4 + [2]])
def test_where_nothing_repeats_often_enough_there_is_no_pattern(kinds):
    assert Pattern.of(kinds) is None


# Points


@st.composite
def places(draw) -> Place:
    period, before, rest = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    pattern = Pattern(before, period, min(rest, period - 1), 0)
    pattern = Pattern(before, period, pattern.rest, pattern.depth(draw(st.integers(4, 30))))
    kept = period * draw(st.integers(0, pattern.periods))
    cut = [(2, 64)] * draw(st.integers(1, 12)) + draw(st.sampled_from([[], [(1, 64)]]))
    return Place.of(pattern, kept, cut)


@given(places(), st.lists(st.integers(-9, 9), min_size=6, max_size=6))
def test_the_weights_of_the_points_reproduce_what_grows_as_a_step_does(place, slopes):
    """Affine in computed and kept layers, in micro-batches, and in the products of the last with each."""

    def figure(point):
        deep, kept, wide = point
        return sum(a * b for a, b in zip(slopes, (1, deep, kept, wide, deep * wide, kept * wide), strict=True))

    assert sum(weight for _, weight in place.points) == 1
    assert sum(weight * figure(point) for point, weight in place.points) == figure(place.wanted)


@given(places())
def test_the_points_are_small_models_with_at_most_three_micro_batches(place):
    for (deep, kept, wide), _ in place.points:
        assert 0 <= deep <= 4 and 0 <= kept <= 3 and 1 <= wide <= 4


@given(places())
def test_layers_of_the_start_stand_for_all_layers(place):
    assume(place.can_lend and place.start[0] > 0)
    layers, last = place.layers(place.start), place.pattern.layers - 1
    stood = Counter({phase: sum(place.stands_for((phase, i)) for i in range(layers - 1)) for phase in _WAYS})
    assert stood == Counter(dict.fromkeys(_WAYS, last))


_WAYS = ("forward", "backward")
