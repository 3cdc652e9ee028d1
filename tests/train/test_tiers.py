"""Where layers, activations, ends and adapters live changes no bit of a step; what it moves is counted."""

import os
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from qlora.config import MemoryConfig
from qlora.errors import AdapterError, CacheError, ModelError
from qlora.model.adapters import attach, trainable
from qlora.model.homes import OnFile
from qlora.model.load import load_base
from qlora.model.nf4 import four_bit_weights
from qlora.model.shards import ShardReader
from qlora.model.source import open_source
from qlora.model.transfer import Lane
from qlora.train.step import choose
from tests.conftest import random_batch

CPU = torch.device("cpu")
LAYERS = 5
TIERS = [
    {"layers_on_device": 0},
    {"layers_on_device": 0, "layers_on_host": 0},
    {"layers_on_device": 2},
    {"layers_on_device": 2, "layers_on_host": 1},
    {"layers_on_device": 1, "layers_on_host": 0},
]
ELSEWHERE = [
    {"activations": "host"},
    {"activations": "file"},
    {"adapters": "host"},
    TIERS[3] | {"activations": "host", "adapters": "host"},
]


@pytest.fixture
def step_of(checkpoint, recipe, tmp_path):
    """step_of(architecture, lora=..., **memory) -> the adapted model, and its step."""

    def make(architecture="llama", lora=None, **memory):
        config = recipe(
            checkpoint(architecture, num_hidden_layers=LAYERS),
            memory={"micro_batch_tokens": 0, "nf4_cache_dir": str(tmp_path)} | memory,
            lora=lora or {},
        )
        model = load_base(config, open_source(config.model), CPU).model
        peft_model = attach(model, config.lora, seed=0).train()
        g = torch.Generator().manual_seed(1)
        for name, parameter in trainable(peft_model).items():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05, generator=g)
        return peft_model, choose(model, CPU, config.memory, 0, tmp_path, print)

    return make


def gradients(model):
    grads = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
    model.zero_grad()
    return grads


def outcome(made, k=3):
    """Loss and gradients of a step, and of the one after it: what a step leaves behind must not matter."""
    model, step = made
    batches = [random_batch(2, 9 + j, seed=j) for j in range(k)]
    results = []
    for number in (1, 2):
        result = step(batches, number)
        results.append((result.losses, gradients(model)))
    return results


def same(a, b):
    return all(
        losses == others
        and grads.keys() == theirs.keys()
        and all(torch.equal(grads[name], theirs[name]) for name in grads)
        for (losses, grads), (others, theirs) in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(
    "memory", [*TIERS, *ELSEWHERE, TIERS[3] | {"activations": "host", "adapters": "host"}], ids=str
)
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_losses_and_gradients_are_bit_equal_to_all_on_the_device(architecture, memory, step_of):
    lora = {"lora_dropout": 0.3} if architecture == "llama" else {}
    expected = outcome(step_of(architecture, lora))
    assert len(expected[0][1]) > LAYERS and any(grad.abs().max() > 0 for grad in expected[0][1].values())
    assert same(outcome(step_of(architecture, lora, **memory)), expected)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("memory", TIERS, ids=str)
def test_a_step_fetches_each_layer_at_most_twice_however_many_micro_batches(memory, k, step_of):
    _, step = step_of(**memory)
    away = step.residency.tiers["host"] + step.residency.tiers["file"]
    last_is_away = step.residency._homes[-1] is not None
    before = step.residency.fetches, step.residency.visits
    step([random_batch(seed=j) for j in range(k)])
    assert step.residency.visits - before[1] == 2 * LAYERS - 1
    # Twice each, and the last layer once. A layer that comes up again as the next one is still in the slot.
    assert 2 * away - 2 <= step.residency.fetches - before[0] <= 2 * away - last_is_away


def test_the_placement_is_as_asked_for_and_evenly_mixed(step_of):
    _, step = step_of(layers_on_device=2, layers_on_host=1)
    assert step.residency.tiers == {"device": 2, "host": 1, "file": 2}
    tiers = [home.tier if home else "device" for home in step.residency._homes]
    assert all(a != b for a, b in pairwise(tiers))


def test_between_visits_nothing_of_a_layer_from_elsewhere_is_on_the_device(step_of):
    _, step = step_of(layers_on_device=0)
    step([random_batch()])
    weights = [weight for layer in step.blocks.layers for weight in four_bit_weights(layer)]
    assert len(weights) == 7 * LAYERS
    assert all(weight.held is None and weight._standing is None for weight in weights)


def test_a_weight_can_be_read_at_any_time_wherever_it_lives(step_of):
    models = [step_of(**memory)[0] for memory in ({}, TIERS[0], TIERS[1])]
    read = [[w.expand() for layer in m.base_model.model.model.layers for w in four_bit_weights(layer)] for m in models]
    for one, others in zip(read[0], zip(*read[1:], strict=True), strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("memory", [{}, TIERS[1], TIERS[3] | {"adapters": "host", "embeddings": "host"}], ids=str)
@pytest.mark.parametrize("room", [0, 2**40])
def test_the_models_own_forward_finds_its_layers_ready(room, memory, step_of):
    model, step = step_of(**memory)
    expected, _ = step_of()
    ids = random_batch(2, 10).input_ids
    with torch.no_grad(), step.whole_model(room):
        found = model(input_ids=ids).logits
        assert torch.allclose(found, expected(input_ids=ids).logits, atol=1e-4)
        assert torch.equal(found, model(input_ids=ids).logits)
    assert all(w._standing is None for layer in step.blocks.layers for w in four_bit_weights(layer))


def test_embedding_and_head_on_the_host_give_the_same_up_to_the_order_of_sums(step_of):
    expected, found = (
        outcome(step_of("gemma3_text")),
        outcome(step_of("gemma3_text", embeddings="host", vocabulary_chunk=50)),
    )
    for (losses, grads), (others, theirs) in zip(expected, found, strict=True):
        assert losses == pytest.approx(others, rel=1e-5)
        # fp32 sums over the vocabulary in another order
        assert all(torch.allclose(grads[n], theirs[n], rtol=1e-3, atol=1e-5 * grads[n].abs().max()) for n in grads)


def test_layers_in_tiles_give_the_same_up_to_the_order_of_sums(step_of):
    expected, found = outcome(step_of()), outcome(step_of(layer_tile_tokens=7))
    for (losses, grads), (others, theirs) in zip(expected, found, strict=True):
        assert losses == pytest.approx(others, rel=1e-5)
        # each weight's gradient is a sum over tokens, now tile by tile
        assert all(torch.allclose(grads[n], theirs[n], rtol=1e-3, atol=1e-5 * grads[n].abs().max()) for n in grads)


def test_evaluation_is_the_same_from_every_tier(step_of):
    batches = [random_batch(2, 9 + j, seed=j) for j in range(3)]
    losses = {step_of(**memory)[1].evaluate(batches).losses for memory in ({}, *TIERS)}
    assert len(losses) == 1


def test_a_layer_that_arrives_late_is_waited_for(step_of, monkeypatch):
    expected = outcome(step_of(), k=1)
    made = step_of(layers_on_device=1, layers_on_host=0)
    read_into = ShardReader.read_into

    def late(reader, buffer, *args, **kwargs):
        buffer.zero_()  # what an earlier layer left there would hide that this one is missing
        time.sleep(0.05)
        read_into(reader, buffer, *args, **kwargs)

    monkeypatch.setattr(ShardReader, "read_into", late)
    assert same(outcome(made, k=1), expected)
    assert made[1].residency.waited > 0.05


def test_no_copy_into_the_slot_begins_before_the_computation_that_had_its_memory_is_done(step_of):
    class Recorder(Lane):
        """A lane whose events are told apart by when they were made."""

        def __init__(self):
            super().__init__(CPU)
            self.issued, self.made = [], 0

        def copy(self, to, source, after=None):
            self.issued.append(after)
            return super().copy(to, source)

        def now(self):
            self.made += 1
            return self.made

    _, step = step_of(layers_on_device=0)
    step.residency._lane = lane = Recorder()
    step([random_batch()])
    step.residency.evict(0)
    step([random_batch()])
    # The first one waits for all that was issued before the slot was made, each later one for the expansion before it.
    assert None not in lane.issued and lane.issued == sorted(set(lane.issued))


def test_a_layer_that_cannot_be_read_stops_the_step_with_its_files_name(step_of, monkeypatch):
    model, step = step_of(layers_on_device=0, layers_on_host=0)
    expected = outcome((model, step))
    home = step.residency._homes[3]
    assert isinstance(home, OnFile)

    def broken(*_):
        raise CacheError(f"{home.reader.path}: cannot be read: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(type(home.reader), "read_into", broken)
        with pytest.raises(CacheError, match=r"layers\.\d\.safetensors"):
            step([random_batch()])
    model.zero_grad()
    assert same(outcome((model, step)), expected)  # the disk is back, and nothing is left of the failure


def test_what_memory_asks_for_and_the_model_has_not_is_an_error_that_says_why(step_of):
    with pytest.raises(ModelError, match="the head is trained"):
        step_of(lora={"modules_to_save": ["lm_head"]}, embeddings="host")
    with pytest.raises(ModelError, match="tiles"):
        step_of("gemma2", layer_tile_tokens=4)


def test_initialisations_that_change_the_base_do_so_in_host_memory_and_not_on_file(step_of):
    expected = outcome(step_of(lora={"init_lora_weights": "pissa"}))
    assert same(outcome(step_of(lora={"init_lora_weights": "pissa"}, layers_on_device=0)), expected)
    with pytest.raises(AdapterError, match="layers on file cannot be changed"):
        step_of(lora={"init_lora_weights": "pissa"}, layers_on_device=0, layers_on_host=0)


def test_memory_knobs_of_a_standard_order_are_refused():
    with pytest.raises(ValidationError, match="rules out"):
        MemoryConfig(order="standard", activations="host")


def test_relief_moves_things_off_the_device_until_nothing_is_left_and_changes_no_bit(step_of):
    model, step = step_of(layers_on_device=4)
    expected = outcome((model, step))
    said = []
    while (changed := step.relieve()) is not None:
        said.append(changed)
        assert same(outcome((model, step)), expected), changed
        if step.residency.tiers["device"] == 0:
            break
    assert said[0] == "memory.activations: host" and said[-1] == "memory.layers_on_device: 0 (1 fewer)"
    assert step.residency.tiers == {"device": 0, "host": LAYERS, "file": 0}


@pytest.mark.parametrize("order", ["layer-major", "standard"])
def test_a_step_that_still_does_not_fit_halves_its_micro_batches_and_gives_the_same_sum(order, step_of):
    """On a device with room for so many tokens at a time."""
    model, step = step_of(
        order=order, **({"activations": "host", "layers_on_device": 0} if order != "standard" else {})
    )
    batches = [random_batch(rows=4, tokens=12, seed=j) for j in range(2)]
    seen, room = [], [10**9]

    def fits(module, arguments, keywords):
        seen.append((keywords.get("input_ids") if "input_ids" in keywords else arguments[0]).numel())
        if seen[-1] > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def computed():
        model.zero_grad()
        seen.clear()
        loss = step(batches).loss
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.get_input_embeddings().register_forward_pre_hook(fits, with_kwargs=True)
    loss, gradients = computed()
    assert seen == [48, 48]
    room[0], said = 12, []
    while True:
        try:
            again, others = computed()
            break
        except torch.OutOfMemoryError:
            said.append(step.relieve())
    assert said == ["micro-batches of 1/2 the size, 2 times as many", "micro-batches of 1/4 the size, 4 times as many"]
    assert seen == [12] * 8
    assert again == pytest.approx(loss, rel=1e-6)
    for name, expected in gradients.items():  # sums of eight parts instead of two, in fp32
        torch.testing.assert_close(others[name], expected, rtol=1e-4, atol=1e-6)
    room[0] = 6
    with pytest.raises(torch.OutOfMemoryError):
        computed()
    assert step.relieve() is None  # each is one document


@pytest.mark.slow
def test_memory_of_a_run_from_file_does_not_grow_with_depth(tmp_path):
    def peak_mib(layers, tier):
        command = [sys.executable, "-m", "tests.train.depth", str(tmp_path), str(layers), tier]
        # glibc keeps freed blocks below a threshold that rises as it sees larger ones; held still, RSS is what is held.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
        for _ in range(2):  # the first one quantizes, and says nothing
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            if ran.stdout:
                return float(ran.stdout)
        raise AssertionError(ran.stderr)

    shallow, deep = peak_mib(8, "file"), peak_mib(32, "file")
    assert deep == pytest.approx(shallow, rel=0.05)
    assert peak_mib(32, "device") > deep + 24 * 2.1  # or the comparison above would hold of anything
