"""Checkpoints: all that a run needs to go on as if it had never stopped.

`checkpoint-<step>/` holds the trained weights in their own precision (fp32 masters), the optimizer's state, and a JSON
with the step, the counts, the generators' states, what the run is about and how it was set; and a manifest with sizes
and SHA-256. The learning rate and the place in the data follow from the step. Safetensors and JSON only: neither can
carry code, and nothing else is opened.

A checkpoint is whole or not there (see `qlora.durable`), it is read back before an older one is removed, and a run is
resumed from the newest one that is still what was written.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qlora import durable
from qlora.config import TrainingConfig
from qlora.errors import CheckpointError, MachineError
from qlora.model.shards import write_safetensors
from qlora.redact import redacted
from qlora.train import generators, optim

PREFIX = "checkpoint-"
_NAME = re.compile(rf"{PREFIX}[1-9][0-9]{{0,11}}")
STATE, WEIGHTS, OPTIMIZER = "state.json", "weights.safetensors", "optimizer.safetensors"
_ADVICE = (
    "earlier checkpoints are whole: once it can be written, --resume goes on from the last;"
    " training.save_total_limit: 1 needs the least room"
)
_BESIDE = 1 << 20  # bytes of a checkpoint that are no tensors: headers, the state, what a file system rounds up
_MOST_STATE = 16 << 20  # bytes; a long chat template is most of it
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. step: optimizer steps taken; tokens: trained on so far; seconds: spent so far."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Progress(_Record):
    step: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]


class _State(_Record):
    """What a checkpoint's JSON says; as strict as if anyone had written it."""

    progress: _Progress
    generators: dict[str, Any]
    identity: dict[str, Any]
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """What a checkpoint is of, JSON-able.

    identity  must be the same for a checkpoint to be resumed: base, data, template, adapter
    settings  may be another: learning rate, length, machine. What differs is said
    """

    identity: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that was found to be what was written.

    generators  their states
    run         what it is of
    today       the date that chat templates were given
    """

    path: Path
    progress: Progress
    generators: Mapping[str, Any]
    run: Run
    today: date | None


def save(
    directory: Path,
    progress: Progress,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    run: Run,
    keep: int | None,
) -> Path:
    """Write `directory/checkpoint-<step>`, read it back, then remove all but the newest `keep`.

    Raises MachineError, and leaves what was there, where it cannot be written.
    """
    path = directory / f"{PREFIX}{progress.step}"
    device = next(iter(parameters.values())).device
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    optimizer_state = optim.state_tensors(optimizer, parameters)
    state = {
        "progress": asdict(progress),
        "generators": generators.state(device),
        "identity": redacted(run.identity),
        "settings": redacted(run.settings),
    }
    try:
        with durable.new_directory(path) as draft:
            for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, optimizer_state)):
                with draft.writer(name) as writer:
                    write_safetensors(writer, tensors)
            draft.write(STATE, json.dumps(state, indent=1).encode())
        durable.verify(path)
    except OSError as error:
        needed = sum(t.nbytes for tensors in (weights, optimizer_state) for t in tensors.values()) + _BESIDE
        raise durable.disk_error(path, error, needed, _ADVICE) from error
    except durable.Damaged as why:
        raise MachineError(f"{path}: {why} when it was read back; is the disk failing? Older ones are kept") from None
    remove_older(path, keep)
    return path


def remove_older(path: Path, keep: int | None) -> None:
    """Remove the checkpoints beside `path` and older than it, so that `keep` are left with it; None: keep all.

    A newer one, of an attempt that went on from an older, stays: it is replaced when its step comes.
    """
    if keep is not None:
        for old in [c for c in checkpoints(path.parent) if _step(c) <= _step(path)][:-keep]:
            shutil.rmtree(old, ignore_errors=True)


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    found = [p for p in directory.glob(f"{PREFIX}*") if _NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    return sorted(found, key=_step)


def newest(directory: Path, say: Callable[[str], object]) -> Checkpoint:
    """The newest checkpoint that is what was written. say: is told which newer ones are passed over, and why.

    Raises CheckpointError where there is none.
    """
    passed_over = []
    for path in reversed(checkpoints(directory)):
        try:
            return _verified(path)
        except durable.Damaged as why:
            passed_over.append(f"{path.name}: {why}{_pickles_in(path)}")
            say(f"{passed_over[-1]}; it is passed over")
    what = "".join(f"\n  {line}" for line in passed_over)
    if what:
        raise CheckpointError(f"{directory}: no checkpoint there can be resumed from{what}")
    raise CheckpointError(f"{directory}: has no checkpoint to resume from; without --resume the run starts there")


def compare(found: Checkpoint, run: Run) -> list[str]:
    """In which settings a run differs from a checkpoint, a line each.

    Raises CheckpointError where it is of a run on another base, data, template or adapter, with what differs.
    """
    # Through JSON, as the other one was: tuples are lists there.
    ours = json.loads(json.dumps(redacted({"identity": run.identity, "settings": run.settings})))
    if differing := _differences(found.run.identity, ours["identity"]):
        raise CheckpointError(f"{found.path}: belongs to another run\n" + "\n".join(f"  {line}" for line in differing))
    return _differences(found.run.settings, ours["settings"])


def load(found: Checkpoint, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint back into the trained weights, the optimizer and the generators; returns how far it is.

    Raises CheckpointError where they are not those of this run.
    """
    path = found.path
    try:
        weights, optimizer_state = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if lost := optim.unlike(weights, parameters):
        raise CheckpointError(f"{path}: holds other weights than this run trains: {lost}")
    try:
        optim.restore(optimizer, parameters, optimizer_state)
        generators.restore(found.generators, next(iter(parameters.values())).device)
    except (RuntimeError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path}: its optimizer or generators are not this run's: {error}") from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return found.progress


def nbytes(training: TrainingConfig, parameters: Mapping[str, nn.Parameter]) -> int:
    """Bytes of one checkpoint, before there is an optimizer's state."""
    weights = sum(parameter.nbytes for parameter in parameters.values())
    return weights + optim.state_nbytes(training, parameters) + _BESIDE


def check_room(
    directory: Path, training: TrainingConfig, parameters: Mapping[str, nn.Parameter], saves: int, beside: int
) -> None:
    """Refuse a run whose checkpoints the disk cannot hold, before its first step.

    saves   checkpoints that the run will write
    beside  bytes that it leaves besides, at its end

    Raises MachineError with what is needed and what is free.
    """
    one, there = nbytes(training, parameters), len(checkpoints(directory))
    most = there + saves
    if training.save_total_limit is not None:  # one more than are kept, as the old one goes when the new one is whole
        most = min(most, training.save_total_limit + 1)
    more = max(most - there, min(saves, 1))
    needed, free = more * one + beside, durable.free_disk_bytes(directory)
    if needed > free:
        each, rest = durable.readable(one), durable.readable(beside)
        raise MachineError(
            f"{directory}: the disk cannot hold what the run will write: it needs {durable.readable(needed)},"
            f" {durable.readable(free)} are free\n"
            f"  checkpoints {more} x {each} | adapter, tokenizer and card {rest}\n"
            "  training.save_total_limit: 1 keeps the fewest; or set another training.output_dir"
        )


def _verified(path: Path) -> Checkpoint:
    """A checkpoint that is what was written. Raises Damaged where anything in it is not."""
    files = durable.verify(path)
    if missing := [name for name in (STATE, WEIGHTS, OPTIMIZER) if name not in files]:
        raise durable.Damaged(f"its manifest has no {missing[0]}")
    if files[STATE].size > _MOST_STATE:
        raise durable.Damaged(f"{STATE} has {files[STATE].size:,} bytes")
    try:
        state = _State.model_validate_json((path / STATE).read_bytes())
        if state.progress.step != _step(path):
            raise ValueError(f"it is of step {state.progress.step}")
        day = state.identity.get("today")
        today = None if day is None else date.fromisoformat(day)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise durable.Damaged(f"{STATE} is damaged: {str(error).splitlines()[0]}") from error
    progress = Progress(**state.progress.model_dump())
    return Checkpoint(path, progress, state.generators, Run(state.identity, state.settings), today)


def _pickles_in(path: Path) -> str:
    found = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    return f" ({found[0]} is a pickle, which can carry code: only safetensors and JSON are read)" if found else ""


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _differences(theirs: Any, ours: Any, key: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(theirs.keys() | ours.keys())
        return [
            line for k in keys for line in _differences(theirs.get(k), ours.get(k), f"{key}.{k}" if key else str(k))
        ]
    if theirs == ours:
        return []
    there, here = _from_where_they_part(str(theirs), str(ours))
    return [f"{key}: `{there}` there, `{here}` here"]


def _from_where_they_part(a: str, b: str, most: int = 60) -> tuple[str, str]:
    """Two long texts, such as templates, cut to where they differ."""
    if max(len(a), len(b)) <= most:
        return a, b
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, same - 10)

    def cut(text: str) -> str:
        shown = text[start : start + most]
        return ("…" if start else "") + shown.replace("\n", "\\n") + ("…" if len(text) > start + most else "")

    return cut(a), cut(b)
