"""The step: the same gradients in both orders, whatever the model, the split, the chunk."""

import copy

import pytest
import torch

from qlora.model.adapters import attach, trainable
from qlora.model.blocks import CannotCut, cut
from qlora.model.load import load_base
from qlora.model.loss import head_loss
from qlora.model.residency import Resident
from qlora.train.step import LayerMajor, MicroBatchMajor
from tests.conftest import ARCHITECTURES, random_batch

CPU = torch.device("cpu")


def adapted(config):
    """A model with an adapter that already does something, ready to train."""
    model = load_base(config, CPU).model
    peft_model = attach(model, config.lora, seed=0) if config.method != "full" else model
    g = torch.Generator().manual_seed(1)
    for name, parameter in trainable(peft_model).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=g)
    return peft_model.train(), model


def layer_major(model, loss_chunk=1024):
    blocks = cut(model)
    return LayerMajor(blocks, Resident(blocks.layers), loss_chunk)


def gradients(model):
    grads = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
    model.zero_grad()
    return grads


def last_hidden(model, blocks, batch):
    """What the model's own forward, with its own layers in place, has after the last of them."""
    left = []
    hook = blocks.layers[-1].register_forward_hook(lambda module, args, out: left.append(out))
    model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    hook.remove()
    return left[0][0] if isinstance(left[0], tuple) else left[0]


def standard_order(model, blocks, batches):
    """Gradient accumulation as everyone does it: whole forward, whole backward, next micro-batch."""
    supervised = sum(batch.supervised for batch in batches)
    total = 0.0
    for batch in batches:
        hidden = last_hidden(model, blocks, batch)
        loss, grad = head_loss(blocks.epilogue, hidden, batch, supervised, 1024, backward=True)
        hidden.backward(grad)
        total += loss.item()
    return total


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_bit_equal_to_the_standard_order(architecture, method, checkpoint, recipe):
    config = recipe(checkpoint(architecture), method)
    peft_model, model = adapted(config)
    step = layer_major(model)
    batches = [random_batch(2, seed=j) for j in range(3)]
    standard = standard_order(model, step.blocks, batches)
    expected = gradients(peft_model)
    result = step(batches)
    found = gradients(peft_model)
    assert result.loss == pytest.approx(standard, rel=1e-6)
    assert found.keys() == expected.keys() and len(found) == len(trainable(peft_model)) > 0
    unequal = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not unequal
    assert any(grad.abs().max() > 0 for grad in found.values())
