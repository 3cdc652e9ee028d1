"""Checkpoints: all that a run needs to go on as if it had never stopped.

`checkpoint-<step>/` holds the trained weights in their own precision (fp32 masters), the optimizer's state, and a JSON
with the step, the counts and what the run is about. No generator's state is needed: every random choice is drawn from
the seed and the number of the step or epoch. Safetensors and JSON only: neither can carry code.

A checkpoint is written under another name and renamed when it is whole, so that a directory with the name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from qlora.errors import CheckpointError
from qlora.train import optim

PREFIX = "checkpoint-"
UNFINISHED = f".{PREFIX}*.unfinished"  # what a killed save leaves
STATE, WEIGHTS, OPTIMIZER = "state.json", "weights.safetensors", "optimizer.safetensors"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. step: optimizer steps taken; tokens: trained on so far; seconds: spent so far."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save(
    directory: Path,
    progress: Progress,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    keep: int | None,
) -> Path:
    """Write `directory/checkpoint-<step>`, then remove all but the newest `keep`.

    identity  what makes the run this run (base, data, adapter); compared on resume

    Raises CheckpointError, and leaves what was there, where it cannot be written.
    """
    path = directory / f"{PREFIX}{progress.step}"
    unfinished = directory / f".{path.name}.{os.getpid()}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        save_file({name: p.detach().contiguous() for name, p in parameters.items()}, unfinished / WEIGHTS)
        save_file(optim.state_tensors(optimizer, parameters), unfinished / OPTIMIZER)
        state = {"progress": asdict(progress), "identity": identity}
        (unfinished / STATE).write_text(json.dumps(state, indent=1))
        for file in unfinished.iterdir():
            _flush(file)
        if path.exists():  # the same step again, after a resume
            shutil.rmtree(path)
        unfinished.rename(path)
        _flush(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if keep is not None:
        for old in checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    return path


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    found = [p for p in directory.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def load(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> Progress:
    """Put a checkpoint back into the trained weights and the optimizer.

    Raises CheckpointError, and changes nothing, where it is incomplete or of a run on another base, adapter or data.
    """
    try:
        state = json.loads((path / STATE).read_text())
        weights, optimizer_state = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
        progress, theirs = Progress(**state["progress"]), state["identity"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint: {error}") from error
    # Through JSON, as the other one was: tuples are lists there.
    if differing := _differences(theirs, json.loads(json.dumps(identity))):
        raise CheckpointError(f"{path}: belongs to another run\n" + "\n".join(f"  {line}" for line in differing))
    if weights.keys() != parameters.keys():
        raise CheckpointError(f"{path}: holds other weights than this run trains")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    optim.restore(optimizer, parameters, optimizer_state)
    return progress


def _differences(theirs: Any, ours: Any, key: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(theirs.keys() | ours.keys())
        return [
            line for k in keys for line in _differences(theirs.get(k), ours.get(k), f"{key}.{k}" if key else str(k))
        ]
    return [] if theirs == ours else [f"{key}: `{theirs}` there, `{ours}` here"]


def _flush(path: Path) -> None:
    """Have the operating system write a file or directory to the disk now."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such call for directories
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
