"""The simulated step holds what the real one holds, and what it moves and computes is what the step's design says."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from qlora.config import Config
from qlora.model.adapters import attach, trainable
from qlora.model.batch import Batch
from qlora.model.homes import OnHost, padded
from qlora.model.load import load_base
from qlora.model.nf4 import FourBit, four_bit_weights, parts_of
from qlora.model.source import open_source
from qlora.plan.simulate import HOST, Ledger, Usage, simulate
from qlora.train.loop import Loop
from qlora.train.step import choose
from tests.conftest import tiny_config

SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
LARGER = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 1024, "num_hidden_layers": 4}
STREAMED = {"layers_on_device": 0, "activations": "host", "embeddings": "host", "adapters": "host"}
ROWS, TOKENS, MICRO_BATCHES = 2, 160, 3


def config_of(recipe, path="unused", **sections) -> Config:
    sections["training"] = {"optim": "adamw_torch"} | sections.get("training", {})
    return recipe(path, **sections)


def real_peak(config: Config, directory) -> int:
    """Most bytes alive on the CPU in the second step of a training run."""
    model = load_base(config, open_source(config.model), HOST).model
    peft_model = attach(model, config.lora, seed=0).train()
    ledger = Ledger()
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.name(tensor, "model")
    for weight in four_bit_weights(model):
        for part in [weight.home.buffer] if isinstance(weight.home, OnHost) else (weight.held or {}).values():
            ledger.name(part, "model")
    ids = torch.randint(3, 1000, (ROWS, TOKENS))
    batches = [Batch(ids, torch.arange(TOKENS).repeat(ROWS, 1), ids.clone()) for _ in range(MICRO_BATCHES)]
    with ledger:
        step = choose(model, HOST, config.memory, 0, directory, print)
        loop = Loop(step, trainable(peft_model), lambda _: batches, config.training, {}, lambda *_, **__: None)
        for number in (1, 2):
            ledger.start()
            loop.update(step(batches, number), batches, number)
    return ledger.peaks[HOST].nbytes


@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"loss_chunk_tokens": 64},
        {"layers_on_device": 1, "layers_on_host": 2},
        {"activations": "host", "adapters": "host"},
        {"layers_on_device": 0, "activations": "file", "embeddings": "host", "vocabulary_chunk": 300},
        {"layer_tile_tokens": 64},
    ],
    ids=str,
)
def test_the_simulated_peak_is_that_of_the_same_step_over_real_tensors(memory, recipe, checkpoint, tmp_path):
    config = config_of(recipe, checkpoint("llama", **LARGER), memory=memory)
    simulated = simulate(config, tiny_config("llama", **LARGER), [(ROWS, TOKENS)] * MICRO_BATCHES, device=HOST)
    # Apart are the last token of each row, which predicts none, and bitsandbytes' code book, which real weights share.
    assert simulated.peak_bytes == pytest.approx(real_peak(config, tmp_path), rel=0.01)


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
    shallow, deep = (tiny(recipe, layers, memory=STREAMED) for layers in (4, 12))
    two_norms = 2 * 512
    assert deep.peak_bytes - shallow.peak_bytes == 8 * two_norms
    assert deep.host["base"] > 2.5 * shallow.host["base"]


def test_a_model_on_the_device_grows_with_depth_by_its_layers_bytes(recipe):
    memory = {"activations": "host", "adapters": "host"}
    shallow, deep = (tiny(recipe, layers, memory=memory) for layers in (4, 12))
    assert deep.peak_bytes - shallow.peak_bytes == 8 * (layer_of()[0] + 2 * 512)


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


def test_planned_time_is_that_of_what_takes_longest():
    usage = Usage({}, {}, {}, "", 100, {"host to device": 50, "device to host": 60, "from file": 7, "to file": 8}, 1)
    assert usage.seconds(10) == 10
    assert usage.seconds(10, host=2) == 30
    assert usage.seconds(10, host=2, file=0.1) == 150


def test_a_large_model_needs_no_memory_of_this_machine(recipe):
    """One layer of a 70B model at its true width, with nothing but its shape."""
    usage = simulate(
        config_of(recipe, model={"dtype": "bfloat16"}, memory=STREAMED), shape_of("llama3.3-70b", 1), [(1, 4096)]
    )
    assert usage.host["base"] == pytest.approx(441e6, rel=0.01)  # ANCHORS of the design: bytes a layer
    assert usage.device["slot and dense buffers"] == pytest.approx(441e6 + 2 * 855_638_016, rel=0.01)


def test_a_model_that_cannot_be_cut_is_simulated_in_the_standard_order(recipe):
    assert tiny(recipe, memory={"order": "standard"}).order == "standard"
    assert tiny(recipe).order == "layer-major"


def shape_of(name: str, layers: int):
    return AutoConfig.for_model(**json.loads((SHAPES / f"{name}.json").read_text()) | {"num_hidden_layers": layers})
