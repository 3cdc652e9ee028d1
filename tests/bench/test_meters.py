"""What is counted is what is there: of ours as the simulation has it, of the stock stack at least what must be."""

import gc
from dataclasses import replace

import pytest
import torch

from qlora.bench.meters import counted
from qlora.bench.methods import batches_of, prepare
from qlora.bench.predictions import _predict
from qlora.bench.work import Setup, Work
from qlora.machine import GIB
from qlora.plan.types import Rates
from qlora.train.checkpoint import Run
from qlora.train.loop import Loop

CPU = torch.device("cpu")
WORK = Work(2, 1, 24)
RATES = Rates(flops=1e11, memory=1e10)


def count(setup, directory, steps=2):
    """The second step of a setup, counted."""
    ready = prepare(setup, directory, CPU, print)
    batches = batches_of(setup, WORK, ready.vocab, ready.source, 1)[0]
    loop = Loop(ready.step, ready.parameters, lambda _: [], ready.config.training, Run(), lambda *_, **__: None)
    for number in range(1, steps):
        loop.update(ready.step(batches, number), batches, number)
    return ready, counted(loop, ready, batches, steps)


def standing_gib():
    """What is alive of other tests: their fixtures, the frames of one that failed. It would be counted too."""
    gc.collect()
    tensors = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.device == CPU)
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values()) / GIB


@pytest.fixture
def setup(checkpoint):
    # Large enough for its peak to stand above the buffers that a simulation knows nothing of.
    path = checkpoint("llama", hidden_size=128, intermediate_size=512, vocab_size=1000, num_hidden_layers=4)
    return Setup("qlora", "qlora", str(path), False, 8, "adamw_torch", "cpu")


@pytest.mark.parametrize("memory", [{}, {"layers_kept": 2}, {"layers_on_device": 0, "layers_on_host": 0}], ids=str)
def test_live_tensors_of_a_step_are_those_of_its_simulation(memory, setup, tmp_path):
    setup, others = replace(setup, memory=memory), standing_gib()
    _, real = count(setup, tmp_path)
    predicted = _predict((setup, WORK), RATES)
    assert real.tensors - others == pytest.approx(predicted.allocated, rel=0.01)


def test_computing_again_is_told_from_what_must_be_computed(setup, tmp_path):
    again, kept = (count(replace(setup, memory={"layers_kept": n}), tmp_path)[1] for n in (0, 3))
    assert again.model_flops == kept.model_flops == kept.flops < again.flops


def test_of_the_stock_stack_no_tensor_is_missed(setup, tmp_path):
    others = standing_gib()
    ready, stock = count(replace(setup, method="hf-qlora"), tmp_path)
    standing = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in (*ready.model.parameters(), *ready.model.buffers())
    }
    trained = sum(p.nbytes for p in ready.parameters.values())
    logits = WORK.rows * WORK.tokens * ready.vocab * 4  # in float32, for the loss
    at_least = sum(standing.values()) + 3 * trained + logits  # the optimizer's two moments and a gradient
    assert at_least * 0.9 < (stock.tensors - others) * GIB < 2.5 * at_least
    assert not stock.by_category and stock.model_flops is None
