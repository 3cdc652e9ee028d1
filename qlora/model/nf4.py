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

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import bitsandbytes.functional as bnb
import torch
from torch import nn
from torch.nn.utils import parametrize

BLOCK_SIZE = 64  # weights that share one absmax
NESTED_BLOCK_SIZE = 256  # absmax values that share one of their own, as bitsandbytes has it


@dataclass(frozen=True, slots=True)
class FourBit:
    """How weights are quantized: bitsandbytes' `quant_type` and `compress_statistics`, and the dtype they expand to."""

    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: torch.dtype = torch.bfloat16


class Home(Protocol):
    """Where the parts of four-bit weights live while they are not on the device; see residency."""

    def parts(self, weight: FourBitWeight) -> dict[str, torch.Tensor]:
        """Fetch the parts of one weight, by name, on the device."""
        ...

    def replace(self, weight: FourBitWeight, parts: Mapping[str, torch.Tensor]) -> None:
        """Let the weight have other values from here on. Raises AdapterError where that can't be."""
        ...


class FourBitWeight(nn.Module):
    """One frozen weight in four bits; called, it gives the dense one.

    Its parts, by name; the last three only with double quantization:

    packed         uint8    [ceil(numel / 2), 1]   two codes a byte, first value in the high nibble
    absmax         uint8    [numel / 64]           largest |w| of each block, itself quantized; float32 if not double
    nested_absmax  float32  [numel / 64 / 256]     largest of each block of absmax
    nested_code    float32  [256]                  what absmax's bytes stand for
    nested_offset  float32  []                     mean that was taken off absmax

    They are on the device, or with `home`, which hands them out: for one reading, or to `hold` for a while.
    """

    def __init__(self, shape: torch.Size, four_bit: FourBit, device: torch.device, name: str = "") -> None:
        """name: the dense weight's in its model, by which a home knows it."""
        super().__init__()
        self.shape, self.four_bit, self.device, self.name = shape, four_bit, device, name
        self.held: Mapping[str, torch.Tensor] | None = None
        self.home: Home | None = None
        self._standing: torch.Tensor | None = None

    @classmethod
    def quantized(cls, dense: torch.Tensor, four_bit: FourBit) -> FourBitWeight:
        """The four-bit form of `dense`, with its parts where that is."""
        weight = cls(dense.shape, four_bit, dense.device)
        weight.held = quantize(dense, four_bit)
        return weight

    def expand(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The dense weight in `compute_dtype`: in `out` where given, else in a new tensor."""
        parts = self.held
        if parts is None:
            assert self.home is not None
            parts = self.home.parts(self)
        return dequantize(parts, self.shape, self.four_bit, out)

    def forward(self, _placeholder: torch.Tensor | None = None) -> torch.Tensor:
        """The dense weight: the one that stands, in a visit; else a new one."""
        return self.expand() if self._standing is None else self._standing

    def dense(self) -> torch.Tensor:
        """The dense weight that stands."""
        assert self._standing is not None, f"{self.name} is asked for outside of a visit"
        return self._standing

    @contextmanager
    def standing(self, out: torch.Tensor | None = None) -> Iterator[None]:
        """Expand once, into `out` where given, and keep the dense weight while the context lasts."""
        if self._standing is not None:  # an outer context keeps it already
            yield
            return
        self._standing = self.expand(out)
        try:
            yield
        finally:
            self._standing = None

    @property
    def nbytes(self) -> int:
        """Bytes at rest."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in parts_of(self.shape, self.four_bit).values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes while it stands."""
        return self.shape.numel() * self.four_bit.compute_dtype.itemsize


def parts_of(shape: Sequence[int], four_bit: FourBit) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each part of a weight of `shape`, which need not exist yet."""
    numel = math.prod(shape)
    blocks = -(-numel // BLOCK_SIZE)
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "packed": (torch.uint8, (-(-numel // 2), 1)),
        "absmax": (torch.uint8 if four_bit.double_quant else torch.float32, (blocks,)),
    }
    if four_bit.double_quant:
        parts["nested_absmax"] = (torch.float32, (-(-blocks // NESTED_BLOCK_SIZE),))
        parts["nested_code"] = (torch.float32, (256,))
        parts["nested_offset"] = (torch.float32, ())
    return parts


def quantize(dense: torch.Tensor, four_bit: FourBit) -> dict[str, torch.Tensor]:
    """The parts of a dense weight, on its device."""
    packed, state = bnb.quantize_4bit(
        dense.contiguous(),
        blocksize=BLOCK_SIZE,
        quant_type=four_bit.quant_type,
        compress_statistics=four_bit.double_quant,
    )
    parts = {"packed": packed, "absmax": state.absmax}
    if four_bit.double_quant:
        nested: Any = state.state2
        assert nested.blocksize == NESTED_BLOCK_SIZE
        parts |= {"nested_absmax": nested.absmax, "nested_code": nested.code, "nested_offset": state.offset}
    return parts


def dequantize(
    parts: Mapping[str, torch.Tensor], shape: torch.Size, four_bit: FourBit, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The dense weight [shape] in `compute_dtype`; in `out` where given."""
    nested = None
    if four_bit.double_quant:
        nested = bnb.QuantState(
            absmax=parts["nested_absmax"],
            code=parts["nested_code"],
            blocksize=NESTED_BLOCK_SIZE,
            dtype=torch.float32,
        )
    state = bnb.QuantState(
        absmax=parts["absmax"],
        shape=shape,
        dtype=four_bit.compute_dtype,
        blocksize=BLOCK_SIZE,
        quant_type=four_bit.quant_type,
        offset=parts.get("nested_offset"),
        state2=nested,
    )
    if out is not None and out.device == torch.device("cpu"):  # bitsandbytes expands into a given tensor on GPUs alone
        return out.copy_(bnb.dequantize_4bit(parts["packed"], state))
    return bnb.dequantize_4bit(parts["packed"], state, out=out)


def quantize_(module: nn.Module, name: str, dense: torch.Tensor, four_bit: FourBit) -> None:
    """Give `module` the four-bit form of `dense` as its frozen tensor `name`; the dense one is not kept.

    The parameter that had that name may be on the meta device: it is dropped unread.
    """
    install(module, name, FourBitWeight.quantized(dense, four_bit))


def install(module: nn.Module, name: str, weight: FourBitWeight) -> None:
    """Put a four-bit weight in the place of `module`'s parameter `name`."""
    delattr(module, name)
    # The placeholder has no elements: what the weight is lives in FourBitWeight, where the memory tiers can move it.
    placeholder = torch.empty(0, dtype=weight.four_bit.compute_dtype, device=weight.device)
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
def standing(module: nn.Module) -> Iterator[None]:
    """Every four-bit weight in `module` is dense while the context lasts, expanded once."""
    with ExitStack() as stack:
        for weight in four_bit_weights(module):
            stack.enter_context(weight.standing())
        yield


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
        if changed:
            parts = quantize(left, frozen.four_bit)
            if frozen.home is None:
                frozen.held = parts
            else:
                frozen.home.replace(frozen, parts)
        install(module, name, frozen)
