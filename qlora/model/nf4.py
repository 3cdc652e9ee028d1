"""Four-bit weights: how they are kept, how they become dense, and for how long.

bitsandbytes owns the number format and its kernels. What is ours is when a weight is dense: a layer's weights are
expanded once, when the step visits the layer, and every micro-batch of the step runs over them. Outside a visit a
weight expands each time it is read, so the model works anywhere, only slower.

A frozen weight becomes four-bit through torch's parametrizations, the public seam for "this tensor is computed from
something else". Its module keeps its kind, so PEFT and transformers see the `nn.Linear` or the stacked experts that
they know, and `module.weight` is the dense weight for whoever reads it.

Source: QLoRA, arXiv:2305.14314, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
from torch import nn
from torch.nn.utils import parametrize

BLOCK_SIZE = 64  # weights that share one absmax


@dataclass(frozen=True, slots=True)
class FourBit:
    """How weights are quantized: bitsandbytes' `quant_type` and `compress_statistics`, and the dtype they expand to."""

    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: torch.dtype = torch.bfloat16


class FourBitWeight(nn.Module):
    """One frozen weight in four bits; called, it gives the dense one.

    packed         uint8    [ceil(numel / 2), 1]   two codes a byte, first value in the high nibble
    absmax         uint8    [numel / 64]           largest |w| of each block, itself quantized; float32 if not double
    nested_absmax  float32  [numel / 64 / 256]     largest of each block of absmax      (double quantization only)
    nested_code    float32  [256]                  what absmax's bytes stand for        (double quantization only)
    nested_offset  float32  []                     mean that was taken off absmax       (double quantization only)
    """

    packed: torch.Tensor
    absmax: torch.Tensor

    def __init__(self, dense: torch.Tensor, four_bit: FourBit) -> None:
        super().__init__()
        self.shape, self.four_bit = dense.shape, four_bit
        packed, state = bnb.quantize_4bit(
            dense.contiguous(),
            blocksize=BLOCK_SIZE,
            quant_type=four_bit.quant_type,
            compress_statistics=four_bit.double_quant,
        )
        nested = state.state2
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("nested_absmax", nested.absmax if nested else None)
        self.register_buffer("nested_code", nested.code if nested else None)
        self.register_buffer("nested_offset", state.offset if nested else None)
        self._nested_block = nested.blocksize if nested else None
        self._standing: torch.Tensor | None = None

    def expand(self) -> torch.Tensor:
        """A new dense tensor of the weight's shape in `compute_dtype`."""
        nested = None
        if self._nested_block is not None:
            nested = bnb.QuantState(
                absmax=self.nested_absmax, code=self.nested_code, blocksize=self._nested_block, dtype=torch.float32
            )
        state = bnb.QuantState(
            absmax=self.absmax,
            shape=self.shape,
            dtype=self.four_bit.compute_dtype,
            blocksize=BLOCK_SIZE,
            quant_type=self.four_bit.quant_type,
            offset=self.nested_offset,
            state2=nested,
        )
        return bnb.dequantize_4bit(self.packed, state)

    def forward(self, _placeholder: torch.Tensor | None = None) -> torch.Tensor:
        """The dense weight: the one that stands, in a visit; else a new one."""
        return self.expand() if self._standing is None else self._standing

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Expand once and keep the dense weight while the context lasts."""
        if self._standing is not None:  # an outer context keeps it already
            yield
            return
        self._standing = self.expand()
        try:
            yield
        finally:
            self._standing = None

    @property
    def nbytes(self) -> int:
        """Bytes at rest."""
        return sum(b.numel() * b.element_size() for b in self.buffers())


def quantize_(module: nn.Module, name: str, dense: torch.Tensor, four_bit: FourBit) -> None:
    """Give `module` the four-bit form of `dense` as its frozen tensor `name`; the dense one is not kept.

    The parameter that had that name may be on the meta device: it is dropped unread.
    """
    _install(module, name, FourBitWeight(dense, four_bit))


def _install(module: nn.Module, name: str, weight: FourBitWeight) -> None:
    delattr(module, name)
    # The placeholder has no elements: what the weight is lives in FourBitWeight, where the memory tiers can move it.
    placeholder = torch.empty(0, dtype=weight.four_bit.compute_dtype, device=weight.packed.device)
    module.register_parameter(name, nn.Parameter(placeholder, requires_grad=False))
    parametrize.register_parametrization(module, name, weight, unsafe=True)


def four_bit_weight(module: nn.Module, name: str = "weight") -> FourBitWeight | None:
    """The four-bit form of a module's tensor, or None if it has none."""
    if not parametrize.is_parametrized(module, name):
        return None
    first = module.parametrizations[name][0]  # type: ignore[index]
    return first if isinstance(first, FourBitWeight) else None


def four_bit_weights(module: nn.Module) -> list[FourBitWeight]:
    """Every four-bit weight in `module` and below."""
    return [m for m in module.modules() if isinstance(m, FourBitWeight)]


@contextmanager
def thawed(module: nn.Module, name: str = "weight") -> Iterator[None]:
    """Let others change a frozen weight: dense and writable inside; quantized again on leaving, if it was changed.

    Initialisations that move part of the base into the adapter (PiSSA, OLoRA) write to `base_layer.weight.data`.
    """
    frozen = four_bit_weight(module, name)
    if frozen is None:
        yield
        return
    dense = frozen.expand()
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    module.register_parameter(name, nn.Parameter(dense, requires_grad=False))
    try:
        yield
    finally:
        left = getattr(module, name).data
        # What nobody touched goes back as it was: quantizing twice rounds the block maxima twice.
        changed = left.dtype != dense.dtype or not torch.equal(left, frozen.expand())
        _install(module, name, FourBitWeight(left, frozen.four_bit) if changed else frozen)
