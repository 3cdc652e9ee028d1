"""Four-bit weights: how far from the truth, how large, and whose they are."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn

from qlora.model.nf4 import FourBit, FourBitWeight, four_bit_weight, four_bit_weights, quantize_, thawed

FP32 = FourBit(compute_dtype=torch.float32)


def linear(out=64, into=128, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(into, out, bias=False, dtype=dtype).requires_grad_(False)


def quantized(out=64, into=128, four_bit=FP32, seed=0):
    module = linear(out, into, four_bit.compute_dtype, seed)
    dense = module.weight.data
    quantize_(module, "weight", dense, four_bit)
    return module, dense


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_error_is_what_bitsandbytes_own_tests_state(double_quant):
    torch.manual_seed(0)
    dense = torch.randn(1024, 1024)
    error = (FourBitWeight.quantized(dense, FourBit("nf4", double_quant, torch.float32)).expand() - dense).abs()
    if double_quant:
        assert error.mean() < 0.11
    else:
        sigma = error.std() / error.numel() ** 0.5  # of the mean
        assert abs(error.mean() - 0.072798) < 7 * sigma


@pytest.mark.parametrize(
    "four_bit", [FP32, FourBit("nf4", False), FourBit("fp4"), FourBit(compute_dtype=torch.float16)]
)
def test_the_dense_weight_is_bitsandbytes_own(four_bit):
    module, dense = quantized(four_bit=four_bit)
    packed, state = bnb.quantize_4bit(
        dense, blocksize=64, quant_type=four_bit.quant_type, compress_statistics=four_bit.double_quant
    )
    assert torch.equal(module.weight, bnb.dequantize_4bit(packed, state))
    assert module.weight.dtype == four_bit.compute_dtype


def test_a_weight_whose_size_is_no_multiple_of_the_block_survives():
    dense = torch.randn(7, 10)
    assert FourBitWeight.quantized(dense, FP32).expand().shape == dense.shape


def test_double_quantization_takes_4_13_bits_a_parameter():
    weight = FourBitWeight.quantized(torch.randn(1024, 1024), FourBit())
    code_book = weight.held["nested_code"].nbytes + weight.held["nested_offset"].nbytes
    assert (weight.nbytes - code_book) * 8 / 2**20 == 4 + 8 / 64 + 32 / 64 / 256


def test_the_module_stays_what_it_was_and_nothing_dense_stays_in_it():
    module, dense = quantized()
    assert isinstance(module, nn.Linear)
    assert sum(t.nbytes for t in (*module.parameters(), *module.buffers(), *four_bit_weight(module).held.values())) < (
        dense.nbytes / 4
    )
    x = torch.randn(3, 128)
    assert torch.equal(module(x), x @ module.weight.t())


def test_stacked_experts_are_quantized_by_the_same_means():
    experts = nn.Module()
    experts.register_parameter("gate_up_proj", nn.Parameter(torch.randn(4, 32, 64), requires_grad=False))
    dense = experts.gate_up_proj.data
    quantize_(experts, "gate_up_proj", dense, FP32)
    assert experts.gate_up_proj.shape == (4, 32, 64)
    assert (experts.gate_up_proj - dense).abs().mean() < 0.11


def test_in_a_visit_the_weight_expands_once():
    module, _ = quantized()
    weight = four_bit_weight(module)
    assert module.weight.data_ptr() != module.weight.data_ptr() or weight._standing is None
    with weight.standing():
        first = module.weight
        with weight.standing():
            assert module.weight is first
        assert module.weight is first
    assert module.weight is not first
    assert torch.equal(module.weight, first)


def test_what_is_written_to_a_thawed_weight_is_quantized_again():
    module, dense = quantized()
    with thawed(module):
        module.weight.data = dense * 2
        assert torch.equal(module.weight, dense * 2)
    assert (module.weight - dense * 2).abs().mean() < 0.11 * dense.std() * 2
    assert len(four_bit_weights(module)) == 1
