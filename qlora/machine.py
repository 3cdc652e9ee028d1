"""The machine that trains: which device, how much memory it has and has used.

torch is imported where it is needed, so that asking for help does not wait for it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30


def pick_device() -> torch.device:
    """The accelerator, where torch finds one; else the CPU."""
    import torch

    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """As a person would say it: `NVIDIA GeForce RTX 3060`, `CPU, 2 threads`."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def memory_kind(device: torch.device) -> str:
    """What the figures below count."""
    return "host RSS" if device.type == "cpu" else "VRAM"


def memory_gib(device: torch.device) -> float:
    """GiB in use now: allocated on an accelerator, resident on the host."""
    if device.type == "cpu":
        import psutil

        return psutil.Process().memory_info().rss / GIB
    import torch

    return torch.accelerator.memory_allocated(device) / GIB


def peak_memory_gib(device: torch.device) -> float:
    """The most GiB that were ever in use: reserved by the allocator on an accelerator, resident on the host."""
    if device.type != "cpu":
        import torch

        return torch.accelerator.max_memory_reserved(device) / GIB
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset / GIB
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on the device."""
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a device or the host has no memory left. Not each allocator has an error of its own."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def first_words(error: BaseException) -> str:
    """What an error says, less the advice and the figures that allocators add."""
    return (str(error) or type(error).__name__).split(". ")[0].split("\n")[0]


def give_back_memory(device: torch.device) -> None:
    """Return to the system what allocators keep for later: torch's on an accelerator, the C library's on the host."""
    import ctypes
    import sys

    import torch

    if device.type != "cpu":
        torch.accelerator.empty_cache()
    if sys.platform == "linux":
        # glibc keeps what lies between blocks in use. musl has no such function and needs none.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
