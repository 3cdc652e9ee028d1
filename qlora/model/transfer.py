"""Bytes on their way between the host and an accelerator, beside the computation.

A `Lane` is a side stream: a copy that is issued on it runs while the device computes, and events, not waiting, say what
comes after what. On the CPU there is no beside: a copy is done when the call returns, and its event is None. So the
tiers above read the same on both.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from qlora.errors import HostMemoryError
from qlora.machine import GIB, free_bytes

HOST = torch.device("cpu")  # `cpu:1` is not: under this name the planner simulates an accelerator
PAGE = 4096  # bytes; what direct I/O and page-locking want addresses to be multiples of

Event = Any  # torch.Event, or None on the CPU, where everything has happened


class Lane:
    """A side stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = None if device.type == "cpu" else torch.Stream(device=device)

    def copy(self, to: torch.Tensor, source: torch.Tensor, after: Event = None) -> Event:
        """Issue a copy behind `after`; returns the event of its end.

        Both tensors must live, unchanged, until then. The host's one should be page-locked, or the copy is not beside.
        """
        if self._stream is None:
            to.copy_(source)
            return None
        if after is not None:
            self._stream.wait_event(after)
        with self._stream:
            to.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def mark(self) -> Event:
        """The event that every copy issued so far is done."""
        return None if self._stream is None else self._stream.record_event()

    def now(self) -> Event:
        """The event that all computation issued so far is done."""
        return None if self._stream is None else torch.accelerator.current_stream(self.device).record_event()

    def follow(self, event: Event) -> None:
        """Let the computation issued from here on come after `event`. The host does not wait."""
        if event is not None:
            torch.accelerator.current_stream(self.device).wait_event(event)


def host_buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """Host memory for copies to and from `device`: uint8 [nbytes], page-aligned, page-locked where `device` is a GPU.

    It is exactly as large as asked for: torch's own page-locked allocations are rounded up to a power of two.

    Raises HostMemoryError with the locked-memory limit, where that is why it cannot be had.
    """
    try:
        whole = torch.empty(nbytes + PAGE, dtype=torch.uint8)
    except RuntimeError as error:
        raise _too_little(nbytes) from error
    if isinstance(whole, FakeTensor):  # the planner's: it has no address
        return whole[:nbytes]
    if nbytes > free_bytes(HOST):  # Linux gives out more than there is, and kills who uses it
        raise _too_little(nbytes)
    start = -whole.data_ptr() % PAGE
    buffer = whole[start : start + nbytes]
    if device.type == "cuda" and nbytes:
        _lock(buffer)
    return buffer


def _lock(buffer: torch.Tensor) -> None:
    runtime: Any = torch.cuda.cudart()
    address, nbytes = buffer.data_ptr(), buffer.numel()
    failed = int(runtime.cudaHostRegister(address, nbytes, 0))
    if failed:
        raise HostMemoryError(
            f"{nbytes / GIB:.2f} GiB of host memory cannot be page-locked (CUDA error {failed}; {_limit()})\n"
            f"  raise the limit (`ulimit -l`), or {_LESS}"
        )
    weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, address)


_LESS = "keep less on the host: memory.layers_on_host (the others are read from a file), memory.activations: file"


def _too_little(nbytes: int) -> HostMemoryError:
    free = free_bytes(HOST)
    return HostMemoryError(f"{nbytes / GIB:.2f} GiB of host memory are needed, {free / GIB:.2f} are free\n  {_LESS}")


def _limit() -> str:
    try:
        import resource
    except ImportError:  # Windows has none
        return "this system sets no locked-memory limit"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "no locked-memory limit" if soft == resource.RLIM_INFINITY else f"locked-memory limit {soft / GIB:.2f} GiB"
