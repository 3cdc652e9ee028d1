"""A merged model on the disk: 16-bit shards that transformers, vLLM and llama.cpp's converter read, all or nothing.

What is written goes to `.NAME.merging.unfinished` first. Each whole shard there has its SHA-256 in progress.json, and
is kept by the next merge of the same adapter, base and plan; nothing stands under NAME before all is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qlora import durable
from qlora.errors import AdapterError, MachineError
from qlora.export.merge import Merged
from qlora.lock import Lock, Locked
from qlora.model.shards import write_safetensors
from qlora.model.source import INDEX

__all__ = ["SHARD_BYTES", "check_place", "write"]

SHARD_BYTES = 5 * 10**9  # of a shard, as transformers has it
_PROGRESS = "progress.json"


def write(
    merged: Merged,
    out: Path,
    beside: Callable[[Path], None],
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Write the merged model to `out`, with its index and configuration, and a manifest of every file's SHA-256.

    beside       writes what else belongs there into the directory that it is given
    shard_bytes  most of a shard; a tensor that is larger has one for itself

    Whole shards of a merge that was cut short are kept. A merged model that is at `out` is replaced, anything else is
    not. Raises AdapterError, MachineError.
    """
    out = out.absolute()
    check_place(out)
    work = out.with_name(f".{out.name}.merging.unfinished")
    try:
        with _locked(work):
            try:
                _write(merged, out, work, beside, shard_bytes, say)
            finally:
                if not (work / _PROGRESS).exists():  # what came to nothing leaves nothing
                    shutil.rmtree(work, ignore_errors=True)
    except Locked as error:
        raise MachineError(f"{out}: {error.holder} is merging there already") from error
    except OSError as error:
        advice = "give --out a directory on a disk with more room"
        if (work / _PROGRESS).exists():
            advice = "whole shards are kept: with more room the same command goes on from them"
        raise durable.disk_error(out, error, merged.nbytes, advice) from error


def check_place(out: Path) -> None:
    """Raise AdapterError where something stands at `out` that `write` has not written."""
    ours = out.is_dir() and (not any(out.iterdir()) or (out / durable.MANIFEST).is_file())
    if os.path.lexists(out) and not ours:
        raise AdapterError(f"{out}: there is something else already; give another place with --out")


def _write(
    merged: Merged,
    out: Path,
    work: Path,
    beside: Callable[[Path], None],
    shard_bytes: int,
    say: Callable[[str], None],
) -> None:
    shards = _shards(merged, shard_bytes)
    identity = hashlib.sha256(json.dumps([merged.identity(), shards]).encode()).hexdigest()
    draft, done = _resume(work, identity)
    if done:
        say(f"{len(done)} of {len(shards)} shards are there from a merge that was cut short")
    needed = 64 << 20  # tokenizer and the like
    needed += sum(merged.nbytes_of(n) for name, names in shards.items() if name not in done for n in names)
    if (free := durable.free_disk_bytes(work)) < needed:
        raise MachineError(
            f"{out}: the merged model needs {durable.readable(needed)} of disk, {durable.readable(free)} are free\n"
            "  --out: a directory on a disk with more room"
        )
    for name, names in shards.items():
        if name not in done:
            with draft.writer(name) as writer:
                write_safetensors(writer, _Shard(merged, names))
            done[name] = draft.adopt()[name].model_dump()
            durable.replace_file(work / _PROGRESS, json.dumps({"identity": identity, "shards": done}).encode())
            say(f"shard {len(done)} of {len(shards)} is written")
    if len(shards) > 1:
        placed = {n: name for name, names in shards.items() for n in names}
        index = {"metadata": {"total_size": merged.nbytes}, "weight_map": dict(sorted(placed.items()))}
        draft.write(INDEX, json.dumps(index, indent=1).encode())
    merged.save_config(draft.path)
    beside(draft.path)
    draft.adopt()
    draft.seal()
    _put_in_place(draft.path, out)
    (work / _PROGRESS).unlink()


def _locked(work: Path) -> Lock:
    """The place to write in, which a merge that ends takes away: then it is made again."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return Lock(work)


def _put_in_place(made: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old.unfinished")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)  # a directory replaces nothing
    os.rename(made, out)
    durable.sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


class _Shard(Mapping[str, Any]):
    """The tensors of one shard as `write_safetensors` takes them: what it asks of each before it writes is known."""

    def __init__(self, merged: Merged, names: Sequence[str]) -> None:
        self._merged, self._left = merged, list(names)

    def items(self) -> Any:
        # The layout is made of empty ones.
        places = self._merged.places
        return [(n, torch.empty(places[n][1], dtype=places[n][0], device="meta")) for n in self._left]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._merged.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._left)

    def __len__(self) -> int:
        return len(self._left)


def _shards(merged: Merged, shard_bytes: int) -> dict[str, list[str]]:
    """Which tensors go into which file, in the checkpoint's order. What is made together stays together."""
    shards: list[list[str]] = []
    size = 0
    for names in merged.together:
        nbytes = sum(map(merged.nbytes_of, names))
        if not shards or (size and size + nbytes > shard_bytes):
            shards.append([])
            size = 0
        shards[-1].extend(names)
        size += nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def _resume(work: Path, identity: str) -> tuple[durable.Draft, dict[str, Any]]:
    """Where to write, with the whole shards that an earlier merge of the same left there. All else of it goes."""
    made, shards = work / "model", {}
    try:
        progress = json.loads((work / _PROGRESS).read_bytes())
        if progress["identity"] == identity:
            shards = dict(progress["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or none that can be believed
    made.mkdir(exist_ok=True)
    while True:
        for path in made.iterdir():
            if path.name not in shards:
                path.unlink()
        draft = durable.Draft(made)
        found = {name: record.model_dump() for name, record in draft.adopt().items()}
        if found == shards:
            return draft, shards
        shards = {name: record for name, record in found.items() if shards[name] == record}
