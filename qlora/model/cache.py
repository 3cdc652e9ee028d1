"""The NF4 cache: a base model quantized once, for every run after the first.

    <home>/nf4/<name>-<key>/manifest.json                what it was made from, and each shard's checksums
                            model.layers.0.safetensors   a shard for each group of tensors: one layer's,
                            rest.safetensors             those of no layer (group ""), ...
    <home>/nf4/<name>-<key>.building-<host>-<pid>-<random>/   one that is being written

A cache is whole or it is not there. It is built beside its place, its manifest written last, and renamed into place
when all of it is on the disk. A crash leaves a directory that the next builder removes. Two processes may build at
once: the first to finish wins, the other takes what it finds.

A cache is fresh while the 16-bit files are the ones it was made from. That is looked up (size and time of change)
and, where the time has changed, proven (sha256).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from qlora.durable import FILE_NAME, MANIFEST, replace_file, sync
from qlora.errors import CacheError
from qlora.machine import GIB
from qlora.model.shards import DTYPES, HEADER, Layout, ShardReader, ShardWriter, cache_disk_error
from qlora.model.source import Source
from qlora.model.transfer import PAGE, host_buffer

FORMAT = 1  # of a cache's directory: the manifest's fields, the layout of shards, the form of a four-bit weight

_DAY = 24 * 3600
_MOST_MANIFEST = 64 << 20  # bytes; that of a model of 126 layers takes one
_LEFTOVER = re.compile(r".+\.(?:building|stale)-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")

# A manifest may come from anyone who can write to the directory: it names files in that directory and nothing else.
_FileName = Annotated[str, StringConstraints(pattern=FILE_NAME)]
_Dtype = Annotated[str, StringConstraints(pattern=f"^({'|'.join(DTYPES)})$")]
_Checksum = Annotated[int, Field(ge=0, lt=2**32)]
_Size = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PartRecord(_Record):
    """One tensor of a shard. dtype: safetensors' name for it."""

    dtype: _Dtype
    shape: Annotated[tuple[_Size, ...], Field(max_length=8)]
    crc32: _Checksum


class ShardRecord(_Record):
    """What `ShardWriter.close` tells of a file. Offsets follow from the parts: see `Layout.of`."""

    file: _FileName
    size: _Size
    data_start: Annotated[int, Field(ge=PAGE, multiple_of=PAGE)]
    header_crc32: _Checksum
    parts: dict[str, PartRecord]

    def layout(self) -> Layout:
        return Layout.of({name: (DTYPES[part.dtype], part.shape) for name, part in self.parts.items()})


class SourceFile(_Record):
    """One 16-bit file that the cache was made from."""

    name: str
    size: _Size
    mtime_ns: int
    sha256: str


class Manifest(_Record):
    """What a cache was made from, and what it is made of.

    source        the model, as a recipe names it, or its place on this disk
    revision      the commit of a hub model
    settings      how it was quantized
    dtype         of the tensors that are not
    bitsandbytes  the version that quantized: for people, it makes no cache stale
    """

    format: int
    source: str
    revision: str | None
    settings: dict[str, Any]
    dtype: str
    files: tuple[SourceFile, ...]
    bitsandbytes: str
    shards: dict[str, ShardRecord]


def cache_home(setting: str | None) -> Path | None:
    """The directory for caches that `memory.nf4_cache_dir` means: None for none, "auto" for the user's own."""
    if setting is None:
        return None
    if setting == "auto":
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora"
    return Path(setting).expanduser()


class Cache:
    """A whole cache. groups: the names of what has a shard each."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self.groups = tuple(manifest.shards)
        self._layouts = {group: shard.layout() for group, shard in manifest.shards.items()}

    def layout(self, group: str) -> Layout:
        """Where a group's tensors lie in its buffer."""
        return self._layouts[group]

    def reader(self, group: str) -> ShardReader:
        """Open a group's shard. A run keeps its readers: another process may replace the files of a changed model.

        Raises CacheError.
        """
        shard = self.manifest.shards[group]
        checksums = {HEADER: shard.header_crc32} | {name: part.crc32 for name, part in shard.parts.items()}
        return ShardReader(self.directory / shard.file, self._layouts[group], shard.data_start, checksums)

    def tensors(self, group: str) -> dict[str, torch.Tensor]:
        """A group's tensors, read and checked: views into one buffer on the host. Raises CacheError."""
        reader = self.reader(group)
        buffer = host_buffer(reader.padded_nbytes, torch.device("cpu"))
        reader.read_into(buffer, verify=True)
        reader.close()
        # `.data`, or autograd would take a write to one of them, which PEFT does to parameters, for a write to all.
        return {name: view.data for name, view in reader.layout.views(buffer).items()}

    def discard(self) -> None:
        """Take it out of its place, as its bytes were found to be wrong: a new one would yield to it."""
        stale = _sibling(self.directory, "stale")
        self.directory.rename(stale)
        shutil.rmtree(stale, ignore_errors=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layout.nbytes for layout in self._layouts.values())


def open_cache(
    home: Path,
    source: Source,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    say: Callable[[str], object] = lambda text: None,
    layouts: Mapping[str, Layout] | None = None,
) -> Cache | None:
    """The cache of this model under these settings if there is one that is whole and fresh, else None.

    say      is told in a line why one that is there is not used
    layouts  groups that it must have, as they must be: another version of transformers may name tensors otherwise

    No weights are read, but the 16-bit files are hashed where they seem touched.
    """
    directory = _directory(home, source, settings, dtype)
    if not directory.is_dir():
        return None
    try:
        cache, files = _checked(directory, source, settings, dtype, layouts or {})
    except _UnusableError as why:
        say(f"NF4 cache {directory} is not used, it will be made anew: {why}")
        return None
    if files != cache.manifest.files:  # touched: hashed this once, not every time
        # A cache that cannot be written is as good to read; one that was replaced a moment ago needs no refreshing.
        with suppress(OSError, _UnusableError), _alone(directory.parent):
            if _read_manifest(directory) == cache.manifest:
                _write_manifest(directory, cache.manifest.model_copy(update={"files": files}))
    return cache


class CacheBuilder:
    """Builds a cache beside its place. To be left by `commit` or `abort`; as a context it aborts what is not committed.

    home     where caches live
    layouts  a layout for each group; others may come with `add`

    Raises MachineError where the disk has too little room or cannot be written.
    """

    def __init__(
        self,
        home: Path,
        source: Source,
        settings: Mapping[str, Any],
        dtype: torch.dtype,
        layouts: Mapping[str, Layout],
    ) -> None:
        self._home, self._source, self._settings, self._dtype = home, source, settings, dtype
        self._layouts = dict(layouts)
        self.target = _directory(home, source, settings, dtype)
        self.directory = _sibling(self.target, "building")
        needed = sum(layout.nbytes for layout in layouts.values())
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(self.target.parent)
            if not self._has_room(needed):
                with _alone(self.target.parent):
                    self._clear_stale()
                if not self._has_room(needed):
                    raise OSError(errno.ENOSPC, "too little room")
            self.directory.mkdir()
        except OSError as error:
            raise cache_disk_error(self.target, error, needed) from error
        self._writers: dict[str, ShardWriter] = {}
        self._before = [_stamp(path) for path in source.files]  # before anyone reads them
        stop = threading.Event()
        # Whatever ends this builder, down to the interpreter's exit, leaves no directory behind; only SIGKILL does.
        self._discard = weakref.finalize(self, _discard, self.directory, self._writers, stop)
        self._hashes = _hash_beside(source.files, stop)

    def writer(self, group: str) -> ShardWriter:
        """The writer of a group's shard. It may be closed as soon as the group is written, or is by `commit`."""
        if group not in self._writers:
            self._writers[group] = ShardWriter(self.directory / _file_of(group), self._layouts[group])
        return self._writers[group]

    def add(self, group: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a group of which no layout was given. Raises MachineError."""
        self._layouts[group] = Layout.of({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
        writer = self.writer(group)
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()

    def commit(self) -> Cache:
        """Bring all to the disk and the directory to its place; returns the cache that is there then.

        Raises MachineError for a full disk, CacheError if the 16-bit files changed meanwhile, ValueError if a tensor
        was not written. The directory is gone in each case.
        """
        try:
            shards = {g: ShardRecord.model_validate(self.writer(g).close()) for g in self._layouts}
            manifest = Manifest(
                format=FORMAT,
                bitsandbytes=version("bitsandbytes"),
                files=self._unchanged_files(),
                shards=shards,
                **_identity(self._source, self._settings, self._dtype),
            )
            try:
                _write_manifest(self.directory, manifest)
                return self._move_into_place(manifest)
            except OSError as error:
                raise cache_disk_error(self.target, error, sum(x.nbytes for x in self._layouts.values())) from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove what was written. Does nothing after `commit`."""
        self._discard()

    def __enter__(self) -> CacheBuilder:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _move_into_place(self, manifest: Manifest) -> Cache:
        with _alone(self.target.parent):
            first = self._clear_stale()
            if first is not None:
                return first
            self.directory.rename(self.target)
            sync(self.target.parent)
        return Cache(self.target, manifest)

    def _clear_stale(self) -> Cache | None:
        """Remove what is at our place, unless it is good: then it is returned. To be called `_alone`."""
        if not self.target.exists():
            return None
        try:
            return _checked(self.target, self._source, self._settings, self._dtype, self._layouts)[0]
        except _UnusableError:
            stale = _sibling(self.target, "stale")
            self.target.rename(stale)
            shutil.rmtree(stale, ignore_errors=True)
            return None

    def _has_room(self, nbytes: int) -> bool:
        slack = GIB // 16  # headers, the manifest, what the file system wants for itself
        return shutil.disk_usage(self.target.parent).free >= nbytes + slack

    def _unchanged_files(self) -> tuple[SourceFile, ...]:
        hashes = self._hashes.result()
        for path, before in zip(self._source.files, self._before, strict=True):
            if _stamp(path) != before:
                raise CacheError(f"{path}: changed while it was quantized\n  run again when it is complete")
        return tuple(
            SourceFile(name=path.name, size=size, mtime_ns=mtime_ns, sha256=sha256)
            for path, (size, mtime_ns), sha256 in zip(self._source.files, self._before, hashes, strict=True)
        )


class _UnusableError(Exception):
    """Why a cache is not used; never leaves this file."""


def _checked(
    directory: Path, source: Source, settings: Mapping[str, Any], dtype: torch.dtype, layouts: Mapping[str, Layout]
) -> tuple[Cache, tuple[SourceFile, ...]]:
    """The cache in a directory, and its 16-bit files as they are now. Raises _UnusableError."""
    manifest = _read_manifest(directory)
    _check_identity(manifest, source, settings, dtype)
    cache = Cache(directory, manifest)
    _check_shards(cache)
    for group, layout in layouts.items():
        if group not in cache.groups or cache.layout(group) != layout:
            raise _UnusableError(f"its tensors of {group or 'the rest'} are not those of the model")
    return cache, _check_files(manifest, source)


def _identity(source: Source, settings: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What one knows of a cache without reading the model."""
    # A directory may change its content, not its place; a hub model is a name and a commit, wherever it lies.
    place = source.name if source.revision else str((source.gguf or source.directory).resolve())
    return {
        "source": place,
        "revision": source.revision,
        "settings": json.loads(json.dumps(dict(settings))),  # as it comes back from a manifest
        "dtype": str(dtype).removeprefix("torch."),
    }


def _file_of(group: str) -> str:
    if not re.fullmatch(FILE_NAME, name := f"{group or 'rest'}.safetensors"):
        raise ValueError(f"group {group!r} cannot be a file's name")
    return name


def _directory(home: Path, source: Source, settings: Mapping[str, Any], dtype: torch.dtype) -> Path:
    identity = _identity(source, settings, dtype)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    readable = source.name if source.revision else Path(identity["source"]).name
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", readable).strip("-.")[-60:]
    return home / "nf4" / f"{readable or 'model'}-{key}"


def _read_manifest(directory: Path) -> Manifest:
    try:
        if (size := (directory / MANIFEST).stat().st_size) > _MOST_MANIFEST:
            raise _UnusableError(f"{MANIFEST} has {size:,} bytes")
        raw = json.loads((directory / MANIFEST).read_bytes())
        if isinstance(raw, dict) and raw.get("format") != FORMAT:
            raise _UnusableError(f"it has format {raw.get('format')!r}, this version of qlora reads {FORMAT}")
        return Manifest.model_validate(raw)
    except FileNotFoundError as error:
        raise _UnusableError(f"it has no {MANIFEST}") from error
    except OSError as error:
        raise _UnusableError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValidationError, ValueError, RecursionError) as error:
        raise _UnusableError(f"{MANIFEST} is damaged: {str(error).splitlines()[0]}") from error


def _check_identity(manifest: Manifest, source: Source, settings: Mapping[str, Any], dtype: torch.dtype) -> None:
    for key, value in _identity(source, settings, dtype).items():
        if getattr(manifest, key) != value:
            raise _UnusableError(f"it was made for {key} {getattr(manifest, key)}, not {value}")


def _check_shards(cache: Cache) -> None:
    for group, shard in cache.manifest.shards.items():
        try:
            there = (cache.directory / shard.file).lstat()
        except OSError as error:
            raise _UnusableError(f"{shard.file}: {error.strerror}") from error
        if not S_ISREG(there.st_mode):
            raise _UnusableError(f"{shard.file} is not a file")
        if there.st_size != shard.size or shard.size != shard.data_start + cache.layout(group).nbytes:
            raise _UnusableError(f"{shard.file} is truncated: {there.st_size:,} of {shard.size:,} bytes")


def _check_files(manifest: Manifest, source: Source) -> tuple[SourceFile, ...]:
    """The 16-bit files as they are now; the same content as when the cache was made."""
    then = {f.name: f for f in manifest.files}
    if set(then) != {path.name for path in source.files}:
        raise _UnusableError("the model has other files than it was made from")
    now = []
    for path in source.files:
        old = then[path.name]
        size, mtime_ns = _stamp(path)
        if size != old.size or (mtime_ns != old.mtime_ns and _sha256(path) != old.sha256):
            raise _UnusableError(f"{path} has changed since")
        now.append(old.model_copy(update={"mtime_ns": mtime_ns}))
    return tuple(now)


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    replace_file(directory / MANIFEST, manifest.model_dump_json(indent=1).encode())


def _hash_beside(files: tuple[Path, ...], stop: threading.Event) -> Future[list[str]]:
    """Hash the 16-bit files while the model is quantized: both read them, so the disk gives them once."""
    hashes: Future[list[str]] = Future()

    def work() -> None:
        try:
            hashes.set_result([_sha256(path, stop) for path in files])
        except BaseException as error:
            hashes.set_exception(error)

    # Not an executor's thread: those keep a program that has failed from ending.
    threading.Thread(target=work, name="qlora-sha256", daemon=True).start()
    return hashes


def _stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in ns."""
    try:
        stat = path.stat()
    except OSError as error:
        raise CacheError(f"{path}: cannot be read: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns


def _sha256(path: Path, stop: threading.Event | None = None) -> str:
    digest, buffer = hashlib.sha256(), bytearray(4 << 20)
    try:
        with path.open("rb", buffering=0) as f:
            while (got := f.readinto(buffer)) and not (stop and stop.is_set()):
                digest.update(memoryview(buffer)[:got])
    except OSError as error:
        raise CacheError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _sibling(target: Path, what: str) -> Path:
    return target.with_name(f"{target.name}.{what}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname()) or "host"


def _sweep(parent: Path) -> None:
    """Remove what builders left that were killed."""
    import psutil

    here = _host()
    for directory in parent.iterdir():
        if not (found := _LEFTOVER.fullmatch(directory.name)):
            continue
        dead = found["host"] == here and not psutil.pid_exists(int(found["pid"]))
        if found["host"] != here:
            # A process that one cannot see, often of a container that is no more. It writes while it lives.
            with suppress(OSError):
                dead = time.time() - max(p.stat().st_mtime for p in (directory, *directory.iterdir())) > _DAY
        if dead:
            shutil.rmtree(directory, ignore_errors=True)


def _discard(directory: Path, writers: Mapping[str, ShardWriter], stop: threading.Event) -> None:
    stop.set()
    for writer in writers.values():
        writer.abort()
    shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Keep other processes out: between looking at a cache and replacing it, another could put a good one there."""
    try:
        import fcntl
    except ImportError:  # Windows, where a directory that is in use cannot be renamed at all
        yield
        return
    with (parent / ".lock").open("w") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
