"""Counts what a program holds, computes and moves while it runs, over fake tensors and over real ones.

A dispatch mode sees every operation: storages as they are born and as they die, FLOPs and bytes of each operation,
copies between host and device. Nothing is estimated that code does.

What it knows beside what PyTorch's own counters say: the memory that a GPU's attention takes inside its kernel, and the
FLOPs of the CPU's attention, which fake tensors take, with only the half counted that a causal mask leaves.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes  # noqa: F401  its operations are named below
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from qlora.plan.allocator import CachingAllocator
from qlora.plan.types import Phase

HOST = torch.device("cpu")
ACCELERATOR = torch.device("cpu", 1)  # no such device: to PyTorch another one than `cpu`, which is all that is needed
BLOCK = 512  # bytes; the CUDA allocator hands out memory in multiples of it

WORKING_SET = "layer working set"
Label = tuple[str, int]  # a phase of the step and the layer that it is in
BEFORE: Label = ("before the step", 0)


@dataclass(slots=True)
class Peak:
    """The most that was held on one device, and what it was."""

    nbytes: int = 0
    by_category: dict[str, int] = field(default_factory=dict)


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage that is alive, on each device, by category.

    category  of storages that are born now
    at        what the program is doing
    peaks     device -> what it was doing -> the most that was held meanwhile
    phases    what it was doing -> what was computed and moved
    """

    def __init__(self) -> None:
        super().__init__()
        self.category, self.at = WORKING_SET, BEFORE
        self.live: dict[torch.device, Counter[str]] = {}
        self.total: Counter[torch.device] = Counter()
        self.peaks: dict[torch.device, dict[Label, Peak]] = {}
        self.phases: dict[Label, Phase] = {}
        self.allocator = CachingAllocator()  # the accelerator's
        self._records: dict[int, tuple[int, torch.device, Any]] = {}  # bytes, device, the allocator's handle
        self._categories: dict[int, str] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}

    def start(self) -> None:
        """Count peaks, transfers and work from here on."""
        self.at, self.phases = BEFORE, {}
        self.peaks = {device: {BEFORE: Peak(n, self._held(device))} for device, n in self.total.items()}

    def peak(self, device: torch.device) -> tuple[Label, Peak]:
        """The most that was held on a device since the start, and when."""
        return max(self.peaks.get(device, {BEFORE: Peak()}).items(), key=lambda item: item[1].nbytes)

    @contextmanager
    def naming(self, category: str) -> Iterator[None]:
        """What is born inside is of this category."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    def name(self, tensor: torch.Tensor | None, category: str) -> None:
        """What this tensor stores is of another category from here on."""
        if tensor is None:
            return
        key = tensor.untyped_storage()._cdata
        if key not in self._records:
            self._born(tensor)
        nbytes, device, _ = self._records[key]
        live = self.live[device]
        live[self._categories[key]] -= nbytes
        live[category] += nbytes
        self._categories[key] = category

    def settle(self, arg: Any) -> None:
        """A fake tensor remembers its device by itself; after `x.data = y` it is where y is."""
        if isinstance(arg, FakeTensor):
            record = self._records.get(arg.untyped_storage()._cdata)
            if record is not None and arg.fake_device != record[1]:
                arg.fake_device = record[1]
        elif isinstance(arg, list | tuple):
            for each in arg:
                self.settle(each)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all there is
            self.settle(args[0])
            return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        if FakeTensor in types:
            for arg in args:
                self.settle(arg)
            if func in _ANSWERS:
                self._note_work(func, args, kwargs or {}, kwargs.get("out") if kwargs else None)
                return _ANSWERS[func](*args)
            if func is torch.ops.aten.nonzero.default:
                func, args = torch.ops.aten.new_empty.default, (args[0], [args[0].numel(), args[0].dim()])
                kwargs = {"dtype": torch.int64}
        self._note_workspace(func, args)
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, torch.Tensor):
                self._born(leaf)
        self._note_work(func, args, kwargs or {}, out)
        return out

    def _born(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._records:
            return
        device = _device(tensor)
        nbytes = stored(storage.nbytes(), device)
        handle = self.allocator.malloc(nbytes) if device == ACCELERATOR and nbytes else None
        self._records[key], self._categories[key] = (nbytes, device, handle), self.category
        self._alive[key] = weakref.ref(storage, lambda _: self._died(key))
        self.live.setdefault(device, Counter())[self.category] += nbytes
        self.total[device] += nbytes
        self._note_peak(device)

    def _died(self, key: int) -> None:
        nbytes, device, handle = self._records.pop(key)
        self.live[device][self._categories.pop(key)] -= nbytes
        self.total[device] -= nbytes
        if handle is not None:
            self.allocator.free(handle)
        del self._alive[key]

    def _held(self, device: torch.device) -> dict[str, int]:
        return {category: n for category, n in self.live[device].items() if n}

    def _note_peak(self, device: torch.device, more: int = 0) -> None:
        """more: bytes that an operation takes inside."""
        peak = self.peaks.setdefault(device, {}).setdefault(self.at, Peak())
        if self.total[device] + more > peak.nbytes:
            peak.nbytes = self.total[device] + more
            peak.by_category = self._held(device)
            if more:
                peak.by_category[self.category] = peak.by_category.get(self.category, 0) + more

    def _note_workspace(self, func: Any, args: Any) -> None:
        """What a GPU's kernel allocates inside, where no tensor shows it: attention's backward."""
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            query, key = args[1], args[2]
            if _device(query) != HOST:
                outputs = query.nbytes + 2 * key.nbytes
                # FlashAttention sums the queries' gradient in fp32, and makes keys' and values' for each query head.
                expanded = 2 * query.nbytes if query.shape[1] != key.shape[1] else 0
                inside = self.allocator.malloc(4 * query.numel() + expanded)
                self._note_peak(_device(query), outputs + 4 * query.numel() + expanded)
                self.allocator.free(inside)

    def _note_work(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if not _works(func):
            return
        phase = self.phases.setdefault(self.at, Phase())
        read = list(_tensors(args))
        written = list(_tensors((out,))) or read
        if not read and not written:
            return
        if func in _COPIES:
            source, to = (args[1], args[0]) if func is torch.ops.aten.copy_.default else (args[0], out)
            if _device(source) != _device(to):
                phase.moved["host to device" if _device(source) == HOST else "device to host"] += source.nbytes
                return
            read, written = [source], [to]
        elif func.__name__.split(".")[0] in _LOOKUPS:
            read = written
        formula = _FLOPS.get(func) or flop_registry.get(getattr(func, "_overloadpacket", None))
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
        if flops and _is_causal(func, args, kwargs):
            flops //= 2
        nbytes = sum(x.nbytes for x in read) + sum(x.nbytes for x in written)
        work = phase.host_work if _device(written[0]) == HOST else phase.work
        work[flops, nbytes] += 1


def stored(nbytes: int, device: torch.device) -> int:
    """Bytes that a storage takes there."""
    return nbytes if device == HOST else -(-nbytes // BLOCK) * BLOCK


def _device(tensor: torch.Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _tensors(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
_LOOKUPS = ("embedding", "gather", "index", "index_select")  # they read as much as they answer
_MAKES_NONE = ("_local_scalar_dense", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_WORKS: dict[Any, bool] = {}


def _works(func: Any) -> bool:
    """Whether an operation touches memory: views and allocations do not."""
    if func not in _WORKS:
        aliases = [r.alias_info for r in func._schema.returns]
        is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        _WORKS[func] = not is_view and func.__name__.split(".")[0] not in _MAKES_NONE
    return _WORKS[func]


_ANSWERS: dict[Any, Callable[..., Any]] = {  # of operations whose results are no tensors
    torch.ops.aten._local_scalar_dense.default: lambda x: 1.0 if x.is_floating_point() else 1,
    torch.ops.aten.allclose.default: lambda *_, **__: True,
    torch.ops.aten.equal.default: lambda *_: True,
    # bitsandbytes' fake kernel compares the shape of `out` with a list, and finds that they differ.
    torch.ops.bitsandbytes.dequantize_4bit.out: lambda *_: None,
}


def _is_causal(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation leaves out what a causal mask hides: half of it."""
    names = [argument.name for argument in func._schema.arguments]
    return bool(({**dict(zip(names, args, strict=False)), **kwargs}).get("is_causal", False))


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward_flops(g: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)


def _grouped_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Of experts' products: each row of `a` [rows, k], or each group of it, meets one matrix of `b` [.., k, n]."""
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _four_bit_flops(a: Any, *_: Any, out_val: Any, **__: Any) -> int:
    return 2 * a.shape[-1] * out_val.numel()


# What has no formula in PyTorch: the CPU's attention, which fake tensors take, experts' products, bitsandbytes.
_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward_flops,
    torch.ops.aten._grouped_mm.default: _grouped_flops,
    torch.ops.bitsandbytes.gemm_4bit.default: _four_bit_flops,
}
