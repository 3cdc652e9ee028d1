"""What the benchmarks share: the work, how a figure is taken, and what is said about the machine beside it."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.machine import GIB, peak_memory_gib

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SEED = 0
RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def random_tokens(vocab: int, k: int, tokens: int, device: torch.device) -> Iterator[torch.Tensor]:
    """k micro-batches, int64 [1, tokens], always the same."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    for _ in range(k):
        yield torch.randint(vocab, (1, tokens), generator=generator).to(device)


def random_batches(vocab: int, k: int, tokens: int, device: torch.device) -> list[Any]:
    """The same as the step takes them: k `Batch`es in which every token that can carry loss does."""
    import torch

    from qlora.model.batch import IGNORE_INDEX, Batch

    batches = []
    for ids in random_tokens(vocab, k, tokens, device):
        labels = ids.clone()
        labels[:, 0] = IGNORE_INDEX  # nothing comes before it that could predict it
        batches.append(Batch(ids, torch.arange(tokens, device=device)[None], labels))
    return batches


def synchronize(device: torch.device) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_gib(device: torch.device) -> float:
    """The most GiB since the last `forget_peak`: allocated on an accelerator, resident on the host."""
    if device.type == "cpu":
        return host_peak_gib()
    import torch

    return torch.accelerator.max_memory_allocated(device) / GIB


def host_peak_gib() -> float:
    """The most GiB of this process that were resident since the last `forget_peak`."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: a new process inherits in it what its parent held when it called exec.
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024 / GIB  # type: ignore[index]
    import torch

    return peak_memory_gib(torch.device("cpu"))


def forget_peak(device: torch.device) -> bool:
    """Count the peaks from here on; False where the system cannot, so that a step's peak has the load's in it."""
    if device.type != "cpu":
        import torch

        torch.accelerator.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    except OSError:
        return device.type != "cpu"
    return True


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def surroundings(warm_up: int) -> dict[str, Any]:
    """Hardware, versions and commit, for the program that runs. To be asked before the work, so that the load average
    is not our own. warm_up: steps that are not timed."""
    import psutil

    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None

    def git(*words: str) -> str | None:  # None without git, or outside a clone
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--", "qlora", "benchmarks/*.py")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD") or os.environ.get("COMMIT"),  # for a copy without git
        "dirty": bool(changed) if changed is not None else None,
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "hardware": {
            "cpu": cpu[1] if cpu else platform.processor(),
            "cores": os.cpu_count(),
            "memory_gib": psutil.virtual_memory().total / GIB,
            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
        "settings": {"r": RANK, "lora_alpha": ALPHA, "learning_rate": LEARNING_RATE, "seed": SEED, "warm_up": warm_up},
    }


def slug(device: str, name: str) -> str:
    """A device as part of a file's name: `cpu`, `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", (device if device == "cpu" else name).lower()).strip("-")


def works_of(text: str) -> list[tuple[int, int]]:
    """`8x128,4x512` -> [(8, 128), (4, 512)]"""
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", text):
        raise argparse.ArgumentTypeError(f"`{text}` is not micro-batches x tokens, as in `8x128,4x512`")
    return [(int(k), int(tokens)) for k, tokens in (work.split("x") for work in text.split(","))]
