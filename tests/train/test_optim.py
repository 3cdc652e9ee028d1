"""The optimizer: what decays, what stands in 8 bits, and a state that survives being written down."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora.config import TrainingConfig
from qlora.train import optim


def parameters():
    """Two matrices of the size from which bitsandbytes keeps its state in 8 bits, a smaller one, a vector."""
    torch.manual_seed(0)
    shapes = {"large": (64, 64), "larger": (128, 64), "small": (8, 64), "vector": (64,)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def built(weights, name, **training):
    said = []
    optimizer, scheduler = optim.build(TrainingConfig(optim=name, **training), weights, 10, said.append)
    return optimizer, scheduler, said


def step(optimizer, weights, number):
    g = torch.Generator().manual_seed(number)
    for parameter in weights.values():
        parameter.grad = torch.randn(parameter.shape, generator=g)
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_a_state_that_was_written_down_goes_on_as_if_it_had_stayed(name, tmp_path):
    weights = parameters()
    optimizer, _, _ = built(weights, name)
    for number in range(3):
        step(optimizer, weights, number)
    save_file(optim.state_tensors(optimizer, weights), tmp_path / "state.safetensors")
    again = {key: nn.Parameter(p.detach().clone()) for key, p in weights.items()}
    restored, _, _ = built(again, name)
    optim.restore(restored, again, load_file(tmp_path / "state.safetensors"))
    for number in range(3, 6):
        step(optimizer, weights, number)
        step(restored, again, number)
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_the_8_bit_optimizer_keeps_8_bits_of_what_is_large_and_32_of_the_rest():
    weights = parameters()
    optimizer, _, _ = built(weights, "adamw_8bit")
    step(optimizer, weights, 0)
    dtypes = {key: tensor.dtype for key, tensor in optim.state_tensors(optimizer, weights).items()}
    assert [dtypes[f"{name}//state1"] for name in weights] == [torch.uint8, torch.uint8, torch.float32, torch.float32]


def test_without_a_cuda_device_the_paged_optimizer_is_the_8_bit_one_and_that_is_said():
    optimizer, _, said = built(parameters(), "paged_adamw_8bit")
    assert type(optimizer).__name__ == "AdamW8bit"
    assert len(said) == 1 and "on cpu it is `adamw_8bit`" in said[0]


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit"])
def test_matrices_decay_and_norms_and_biases_do_not(name):
    weights = parameters()
    before = {key: p.detach().clone() for key, p in weights.items()}
    optimizer, _, _ = built(weights, name, learning_rate=0.1, weight_decay=0.5, lr_scheduler_type="constant")
    for parameter in weights.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(weights["vector"], before["vector"])
    for key in ("large", "larger", "small"):
        torch.testing.assert_close(weights[key].detach(), before[key] * (1 - 0.1 * 0.5))
