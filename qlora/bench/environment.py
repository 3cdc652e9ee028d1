"""The machine that measures, as it is written beside the figures: hardware, driver, versions, commit, command."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from qlora.machine import GIB
from qlora.redact import redact

if TYPE_CHECKING:
    import torch

TREE = Path(__file__).parents[2]  # of the sources, where this is no installed wheel
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def surroundings() -> dict[str, Any]:
    """Facts of this machine and program. To be asked before the work, so that the load average is not our own."""
    return {
        "command": redact(shlex.join([*_program(), *sys.argv[1:]])),
        **_commit(),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "system": platform.platform(terse=True),
        "cpu": _cpu(),
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "memory_gib": psutil.virtual_memory().total / GIB,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def today() -> str:
    """The date and time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def slug(text: str) -> str:
    """Text as part of a file's name: `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _program() -> list[str]:
    script = Path(sys.argv[0])
    return ["python", f"benchmarks/{script.name}"] if script.parent.name == "benchmarks" else ["qlora"]


def _commit() -> dict[str, Any]:
    def git(*words: str) -> str | None:  # None without git, or outside a clone
        try:
            done = subprocess.run(["git", *words], cwd=TREE, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--", "qlora", "benchmarks/suites", "benchmarks/shapes")
    return {
        "commit": git("rev-parse", "HEAD") or os.environ.get("COMMIT"),  # for a copy without git
        "dirty": bool(changed) if changed is not None else None,
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1] if found else platform.processor()


def accelerator(device: torch.device) -> dict[str, Any]:
    """Facts of a GPU; none of a CPU. Asking takes memory of it: see `harness.probe`."""
    if device.type == "cpu":
        return {}
    import torch

    total = torch.accelerator.get_memory_info(device)[1]
    return {"device_gib": total / GIB, "cuda": torch.version.cuda, "driver": _driver()}


def _driver() -> str | None:
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", version.read_text()) if version.is_file() else None
    return found[1] if found else None
