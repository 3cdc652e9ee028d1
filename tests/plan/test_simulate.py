"""The simulated step holds what the real one holds, and what it moves and computes is what the step's design says."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from qlora.config import Config
from qlora.model.adapters import attach, trainable
from qlora.model.batch import Batch
from qlora.model.blocks import cut
from qlora.model.homes import OnHost, padded
from qlora.model.load import load_base
from qlora.model.nf4 import FourBit, four_bit_weights, parts_of
from qlora.model.residency import Residency
from qlora.model.source import open_source
from qlora.plan.ledger import BEFORE, HOST, WORKING_SET, Ledger
from qlora.plan.periodic import Simulator
from qlora.plan.simulate import (
    ADAPTERS,
    BASE,
    BOUNDARIES,
    DENSE,
    ENDS,
    GRADIENTS,
    LOSS,
    OPTIMIZER,
    Watched,
    cut_of,
    record,
    simulate,
)
from qlora.plan.types import Usage
from qlora.train.checkpoint import Run
from qlora.train.loop import Loop
from tests.conftest import tiny_config

SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
LARGER = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 1024, "num_hidden_layers": 4}
STREAMED = {"layers_on_device": 0, "activations": "host", "embeddings": "host", "adapters": "host"}
ROWS, TOKENS = 2, 160
ONE_BY_ONE = {"micro_batch_tokens": 0}
TINY = 256  # bytes: numbers that a real run keeps in a tensor of their own


def config_of(recipe, path="unused", **sections) -> Config:
    sections["training"] = {"optim": "adamw_torch"} | sections.get("training", {})
    return recipe(path, **sections)


def really_held(config: Config, micro_batches: int, directory) -> dict[tuple[str, int], dict[str, int]]:
    """What is alive on the CPU in the second step of a training run: the most in each of its moments, by category.

    The model is loaded and trained; the step says what it is doing, as the simulated one does, and files are files.
    """
    model = load_base(config, open_source(config.model), HOST).model
    attached = attach(model, config.lora, seed=0).train()
    ledger = Ledger()
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.name(tensor, ADAPTERS if tensor.requires_grad else ENDS)
    for weight in four_bit_weights(model):
        for part in [weight.home.buffer] if isinstance(weight.home, OnHost) else (weight.held or {}).values():
            ledger.name(part, BASE)
    with ledger:
        with ledger.naming(ENDS):
            blocks = cut(model)
            step = Watched(blocks, Residency(blocks.layers, HOST), config.memory, 0, directory)
        step.watched_by(ledger)
        tokens = [torch.randint(3, 1000, (ROWS, TOKENS)) for _ in range(micro_batches)]
        batches = [Batch(ids, torch.arange(TOKENS).repeat(ROWS, 1), ids.clone()) for ids in tokens]
        loop = Loop(step, trainable(attached), lambda _: batches, config.training, Run(), lambda *_, **__: None)
        for number in (1, 2):
            ledger.start()
            ledger.at = ("prologue", 0)
            result = step(batches, number)
            ledger.name(step.residency._slot, DENSE)
            ledger.at = ("optimizer", 0)
            for parameter in loop.parameters.values():
                ledger.name(parameter.grad, GRADIENTS)
            with ledger.naming(OPTIMIZER if number == 1 else ledger.category):
                loop.update(result, batches, number)
    return {at: peak.by_category for at, peak in ledger.peaks[HOST].items()}


@functools.cache
def cut_once():
    """How the tiny model is cut: to prove it anew in each test takes twice the time of its step."""
    sections = {"model": {"model_name_or_path": "x", "dtype": "float32"}, "data": {"datasets": [{"path": "x"}]}}
    return cut_of(Config.model_validate(sections | {"lora": {"r": 4}}), tiny_config("llama", **LARGER))


@pytest.mark.parametrize(
    ("k", "memory"),
    [
        (1, {}),
        (1, {"layers_kept": 2, "activations": "host"}),
        (2, {"micro_batch_tokens": TOKENS, "loss_chunk_tokens": 32}),  # four of one row
        (3, {"activations": "host", "adapters": "host"}),  # one of six rows
        (3, ONE_BY_ONE | {"loss_chunk_tokens": 64}),
        (3, ONE_BY_ONE | {"activations": "host", "adapters": "host"}),
        (3, ONE_BY_ONE | {"activations": "file", "layers_on_device": 0, "embeddings": "host", "vocabulary_chunk": 300}),
        (2, ONE_BY_ONE | {"layers_on_device": 1, "layers_on_host": 2, "loss_chunk_tokens": 128}),
        (2, ONE_BY_ONE | {"layers_on_device": 0, "layers_on_host": 0}),
        (2, ONE_BY_ONE | {"layers_kept": 3, "layers_on_device": 2, "layers_on_host": 1}),
        (3, ONE_BY_ONE | {"layers_kept": 1, "activations": "file"}),
        (3, ONE_BY_ONE | {"layers_kept": 2, "loss_chunk_tokens": 100, "layers_on_device": 0}),
        (2, ONE_BY_ONE | {"layer_tile_tokens": 120}),
        (2, ONE_BY_ONE | {"layer_tile_tokens": 160, "activations": "file", "layers_on_device": 1, "layers_on_host": 1}),
        (2, {"layer_tile_tokens": 320, "activations": "host", "adapters": "host", "loss_chunk_tokens": 64}),
    ],
    ids=str,
)
def test_every_category_is_what_the_same_step_holds_over_real_tensors(k, memory, recipe, checkpoint, tmp_path):
    config = config_of(recipe, checkpoint("llama", **LARGER), memory=memory)
    shape = tiny_config("llama", **LARGER)
    simulated = record(config, shape, [(ROWS, TOKENS)] * k, device=HOST, like=cut_once()).device
    real = really_held(config, k, tmp_path)
    assert real.keys() == simulated.keys()
    assert {("prologue", 0), ("forward", 0), ("turn", 3), ("backward", 0), ("optimizer", 0)} < real.keys()
    # Before the step, the real run still has the arenas of the step before.
    for at in real.keys() - {BEFORE}:
        # The head and its loss see one token less in each row: the last one predicts none. What was loaded from the
        # NF4 cache shares storages that are padded to pages.
        for category in real[at].keys() | simulated[at].keys():
            expected = real[at].get(category, 0)
            assert simulated[at].get(category, 0) == pytest.approx(expected, rel=0.01, abs=TINY), (at, category)
    most = max(real.values(), key=lambda held: sum(held.values()))
    assert {ENDS, ADAPTERS, OPTIMIZER, BOUNDARIES, LOSS, WORKING_SET} < most.keys()
    assert GRADIENTS in real["optimizer", 0]


def tiny(recipe, layers=4, k=2, tokens=64, architecture="llama", **sections) -> Usage:
    shape = tiny_config(architecture, **(LARGER | {"num_hidden_layers": layers}))
    return simulate(config_of(recipe, **sections), shape, [(1, tokens)] * k)


def layer_of() -> tuple[int, int]:
    """4-bit bytes of one layer, as parts in blocks of 512 bytes and as one run of bytes."""
    shapes = [(128, 128), (64, 128), (64, 128), (128, 128), (384, 128), (384, 128), (128, 384)]
    parts = [parts_of(shape, FourBit()) for shape in shapes]
    sizes = [math.prod(shape) * dtype.itemsize for each in parts for dtype, shape in each.values()]
    return sum(-(-size // 512) * 512 for size in sizes), sum(sizes)


def test_memory_on_the_device_grows_with_depth_by_its_norms_alone_when_all_else_is_elsewhere(recipe):
    shallow, deep = (tiny(recipe, layers, memory=STREAMED) for layers in (4, 8))
    two_norms = 2 * 512
    assert deep.peak_bytes - shallow.peak_bytes == 4 * two_norms
    assert deep.host["base"] > 1.9 * shallow.host["base"]


@pytest.mark.parametrize("adapters", ["host", "device"])
def test_a_streamed_model_of_80_layers_takes_what_one_of_8_does_but_for_adapters_and_norms(adapters, recipe):
    memory = STREAMED | {"adapters": adapters, "loss_chunk_tokens": 2048}
    lora = {"r": 4}  # few enough that their gradients do not move the peak from the loss
    sections = {"model": {"dtype": "bfloat16"}, "data": {"max_seq_length": 4096}, "lora": lora, "memory": memory}
    config = config_of(recipe, **sections, training={"gradient_accumulation_steps": 1})

    def held(layers: int) -> tuple[Usage, int]:
        usage = Simulator(config, shape_of("llama3.3-70b", layers), 4096).usage(config.memory)
        return usage, sum(n for name, n in usage.device.items() if name not in (ADAPTERS, GRADIENTS, OPTIMIZER))

    (deep, most), (shallow, least) = held(80), held(8)
    two_norms = 2 * 8192 * 2
    assert most - least == 72 * two_norms
    assert deep.moment == shallow.moment and deep.layers == 80
    assert deep.host[BASE] > 9.9 * shallow.host[BASE]


def test_a_model_on_the_device_grows_with_depth_by_its_layers_bytes(recipe):
    memory = {"activations": "host", "adapters": "host"}
    shallow, deep = (tiny(recipe, layers, memory=memory) for layers in (4, 8))
    assert deep.peak_bytes - shallow.peak_bytes == 4 * (layer_of()[0] + 2 * 512)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("on_host", [4, 0])
def test_a_step_moves_each_layer_twice_whatever_its_number_of_micro_batches(on_host, k, recipe):
    usage = tiny(recipe, k=k, memory={"layers_on_device": 0, "layers_on_host": on_host})
    # The last layer turns around, and the first is still in the slot from the step before.
    fetched = 2 * 4 - 2
    layer = layer_of()[1] if on_host else padded(layer_of()[1])
    assert usage.moved["host to device"] == fetched * layer
    assert usage.moved.get("from file", 0) == (0 if on_host else fetched * layer)


def test_flops_are_those_of_the_matrix_products(recipe):
    usage = tiny(recipe, lora={"r": 1})
    frozen, tokens, layers = 128 * (128 + 64 + 64 + 128 + 3 * 384), 2 * 64, 4
    # Forward of all layers and again of all but the last, backward to the inputs, and the head forward and back.
    expected = 2 * tokens * (frozen * (2 * layers - 1 + layers) + 1024 * 128 * 2)
    # The adapter of rank 1 and attention over 64 tokens are the rest.
    assert expected < usage.flops < 1.15 * expected


def test_a_large_model_needs_no_memory_of_this_machine(recipe):
    """One layer of a 70B model at its true width, with nothing but its shape."""
    usage = simulate(
        config_of(recipe, model={"dtype": "bfloat16"}, memory=STREAMED), shape_of("llama3.3-70b", 1), [(1, 4096)]
    )
    assert usage.host["base"] == pytest.approx(441e6, rel=0.01)  # ANCHORS of the design: bytes a layer
    assert usage.device[DENSE] == pytest.approx(441e6 + 2 * 855_638_016, rel=0.01)


def test_a_model_that_cannot_be_cut_is_simulated_in_the_standard_order(recipe):
    assert tiny(recipe, memory={"order": "standard"}).order == "standard"
    assert tiny(recipe).order == "layer-major"


def shape_of(name: str, layers: int):
    return AutoConfig.for_model(**json.loads((SHAPES / f"{name}.json").read_text()) | {"num_hidden_layers": layers})
