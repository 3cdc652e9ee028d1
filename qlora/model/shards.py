"""A shard: the tensors of one layer in one safetensors file that is read at the speed of the disk.

The bytes after the header are the layer's memory as it stands in its buffer, so that reading a layer is reading one run
of bytes to one place. Nothing is parsed or copied on the way, and its tensors are views into the buffer. The header
is padded so that this run begins at a page: then the file can be read directly, past the page cache. A model that
does not fit into memory would only wash the cache out, twice a step.

Every part has a checksum, and so has the header: what is read is what was written, or an error that names the file.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import threading
import weakref
import zlib
from collections.abc import Mapping
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from qlora.durable import Writer, disk_error
from qlora.errors import CacheError, MachineError
from qlora.model.transfer import PAGE

CHUNK = 16 << 20  # bytes of one read; a multiple of PAGE
HEADER = ""  # the name that a file's header has among its checksums

DTYPES: dict[str, torch.dtype] = {  # by safetensors' names
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor's place. offset: bytes from the start of the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """Where tensors lie in one run of `nbytes` bytes, in the order of their offsets and without holes."""

    parts: tuple[Part, ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Layout:
        """Place tensors, given as name -> (dtype, shape). The same tensors always get the same layout."""

        # safetensors forbids holes, so alignment has to come from the order. What goes before a part is a sum of
        # multiples of its own power of two: each starts at a multiple of that, so of its dtype's size.
        def place(part: Part) -> tuple[int, int, str]:
            return -min(part.nbytes & -part.nbytes or PAGE, PAGE), -part.nbytes, part.name

        parts, offset = [], 0
        for part in sorted((Part(name, dtype, tuple(shape), 0) for name, (dtype, shape) in tensors.items()), key=place):
            parts.append(Part(part.name, part.dtype, part.shape, offset))
            offset += part.nbytes
        return cls(tuple(parts), offset)

    @property
    def padded_nbytes(self) -> int:
        """Bytes that a buffer for reading must have: direct reads end at a page."""
        return -(-self.nbytes // PAGE) * PAGE

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in `buffer`, uint8 [>= nbytes] on any device: views, no copies."""
        return {p.name: buffer[p.offset : p.offset + p.nbytes].view(p.dtype).view(p.shape) for p in self.parts}

    def header(self) -> bytes:
        """What a safetensors file says of itself before its data: whole pages."""
        described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for p in self.parts:
            offsets = [p.offset, p.offset + p.nbytes]
            described[p.name] = {"dtype": _NAMES[p.dtype], "shape": p.shape, "data_offsets": offsets}
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE)
        return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Writes one shard, tensor by tensor in any order, from any thread.

    Raises MachineError where the disk is full or cannot be written.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout = path, layout
        self._parts = {part.name: part for part in layout.parts}
        self._checksums: dict[str, int] = {}
        self._closed: dict[str, Any] | None = None
        self._lock = threading.Lock()
        header = layout.header()
        self._data_start, self._header_checksum = len(header), zlib.crc32(header)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise cache_disk_error(path, error, layout.nbytes) from error
        self._fd, self._close_fd = fd, weakref.finalize(self, os.close, fd)
        self._write(memoryview(header), 0)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, on any device. Raises ValueError where it is not what the layout has under this name."""
        part = self._parts[name]
        if (tensor.dtype, tuple(tensor.shape)) != (part.dtype, part.shape):
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, its place {part.dtype} {list(part.shape)}"
            )
        content = _bytes(tensor)
        self._write(content, self._data_start + part.offset)
        self._checksums[name] = zlib.crc32(content)

    def close(self) -> dict[str, Any]:
        """Bring the file to the disk; returns what a manifest keeps of it. A second call returns the same.

        Raises ValueError where a tensor was not written.
        """
        if self._closed is None:
            if missing := [part.name for part in self.layout.parts if part.name not in self._checksums]:
                raise ValueError(f"{self.path}: {len(missing)} tensors were not written, {missing[0]} first")
            try:
                os.fsync(self._fd)
                self._close_fd()
            except OSError as error:
                raise cache_disk_error(self.path, error, self.layout.nbytes) from error
            self._closed = {
                "file": self.path.name,
                "size": self._data_start + self.layout.nbytes,
                "data_start": self._data_start,
                "header_crc32": self._header_checksum,
                "parts": {
                    p.name: {"dtype": _NAMES[p.dtype], "shape": p.shape, "crc32": self._checksums[p.name]}
                    for p in self.layout.parts
                },
            }
        return self._closed

    def abort(self) -> None:
        """Remove the file."""
        self._close_fd()
        self.path.unlink(missing_ok=True)

    def _write(self, content: memoryview, offset: int) -> None:
        try:
            while content:
                written = self._write_at(content, offset)
                content, offset = content[written:], offset + written
        except OSError as error:
            raise cache_disk_error(self.path, error, self.layout.nbytes) from error

    def _write_at(self, content: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._fd, content, offset)
        with self._lock:  # Windows
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, content)


class ShardReader:
    """Reads one shard. The file stays open, and readable, also where another process replaces its directory.

    direct  whether reads go past the page cache; they do where the system and the file system can

    Raises CacheError on opening if the file cannot be read or its header is not the one that was written.
    """

    def __init__(self, path: Path, layout: Layout, data_start: int, checksums: Mapping[str, int]) -> None:
        self.path, self.layout, self.data_start = path, layout, data_start
        self._checksums = checksums
        self._lock = threading.Lock()
        self.direct = hasattr(os, "O_DIRECT")
        try:
            try:
                self._open()
            except OSError as error:
                # Some file systems refuse to open a file so, some only to read it: the header is the probe.
                if not self.direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self.direct = False
                self._open()
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error

    @property
    def padded_nbytes(self) -> int:
        """Bytes that a buffer for `read_into` must have."""
        return self.layout.padded_nbytes

    def read_into(self, buffer: torch.Tensor, readers: Executor | None = None, verify: bool = False) -> None:
        """Read the shard to the start of `buffer`: uint8 [>= padded_nbytes] on the host, page-aligned.

        readers  threads that share the work; the call must not come from one of them, which it would wait for
        verify   check what was read against its checksums; to be asked for the first time that a process reads a shard

        Raises CacheError. Nothing writes to the buffer any more when it is raised.
        """
        view = self._aligned(buffer, self.padded_nbytes)
        jobs = [(view[at : at + CHUNK], min(CHUNK, self.layout.nbytes - at), self.data_start + at) for at in self._at()]
        if readers is None:
            for job in jobs:
                self._read(*job)
        else:
            reads = [readers.submit(self._read, *job) for job in jobs]
            wait(reads)
            for read in reads:
                read.result()
        if verify:
            self.verify(buffer, readers)

    def chunks(self) -> list[slice]:
        """The bytes of the data that `read_chunk` reads, by k."""
        return [slice(at, min(at + CHUNK, self.layout.nbytes)) for at in self._at()]

    def read_chunk(self, k: int, buffer: torch.Tensor) -> int:
        """Read `chunks()[k]` to the start of `buffer`, uint8 [CHUNK] on the host, page-aligned; returns its bytes.

        For a device that is filled through a small page-locked buffer. Raises CacheError.
        """
        chunk = self.chunks()[k]
        nbytes = chunk.stop - chunk.start
        view = self._aligned(buffer, -(-nbytes // PAGE) * PAGE)
        self._read(view, nbytes, self.data_start + chunk.start)
        return nbytes

    def verify(self, buffer: torch.Tensor, readers: Executor | None = None) -> None:
        """Check each tensor in `buffer`, which may be on a device, against its checksum.

        Raises CacheError that names the file and the tensor.
        """

        def holds(part: Part) -> bool:
            content = _bytes(buffer[part.offset : part.offset + part.nbytes])
            return zlib.crc32(content) == self._checksums[part.name]

        parts = self.layout.parts
        for part, good in zip(parts, map(holds, parts) if readers is None else readers.map(holds, parts), strict=True):
            if not good:
                raise self._error(f"{part.name} is not what was written (its checksum differs)")

    def close(self) -> None:
        self._close_fd()

    def _at(self) -> range:
        return range(0, self.layout.nbytes, CHUNK)

    def _aligned(self, buffer: torch.Tensor, nbytes: int) -> memoryview:
        """The first bytes of a buffer, up to a page's end."""
        if buffer.dtype != torch.uint8 or buffer.numel() < nbytes or buffer.data_ptr() % PAGE:
            raise ValueError(f"a buffer of {nbytes:,} bytes at a page's start is needed, got {buffer.numel():,}")
        return memoryview(cast(Any, buffer.numpy()))[:nbytes]

    def _open(self) -> None:
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | (os.O_DIRECT if self.direct else 0)
        self._fd = os.open(self.path, flags)
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        header = mmap.mmap(-1, self.data_start)  # the one buffer in Python that begins at a page
        try:
            self._fill(memoryview(header), self.data_start, 0)
            if zlib.crc32(header) != self._checksums[HEADER]:
                raise self._error("its header is not what was written (its checksum differs)")
        except BaseException:
            self._close_fd()
            raise

    def _read(self, view: memoryview, nbytes: int, offset: int) -> None:
        try:
            self._fill(view, nbytes, offset)
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error

    def _fill(self, view: memoryview, nbytes: int, offset: int) -> None:
        """Read at least `nbytes` from the file's `offset` to `view`, which goes on to a page's end."""
        done = 0
        while done < nbytes:
            got = self._read_at(view[done:], offset + done)
            done += got
            # A direct read stops within a page only where the file does.
            if done < nbytes and (got == 0 or (self.direct and done % PAGE)):
                raise self._error(f"truncated: it ends at byte {offset + done:,}, {nbytes - done:,} more were to come")

    def _read_at(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [view], offset)
        with self._lock:  # Windows
            os.lseek(self._fd, offset, os.SEEK_SET)
            content = os.read(self._fd, len(view))
        view[: len(content)] = content
        return len(content)

    def _error(self, what: str) -> CacheError:
        return CacheError(
            f"{self.path}: {what}\n"
            f"  delete the directory {self.path.parent} and run again: it is made anew from the 16-bit files;\n"
            "  checkpoints do not need it, --resume goes on from the last one"
        )


def write_safetensors(writer: Writer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors, on any device, as one safetensors file; on the host stands one of them at a time."""
    layout = Layout.of({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    writer.write(layout.header())
    for part in layout.parts:
        writer.write(_bytes(tensors[part.name]))


def cache_disk_error(path: Path, error: OSError, nbytes: int) -> MachineError:
    """The error for a disk that does not take `nbytes` bytes of a cache at `path`."""
    return disk_error(
        path,
        error,
        nbytes,
        "memory.nf4_cache_dir: a directory on a disk with more room, or null to train without a cache",
    )


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(cast(Any, flat.numpy()))
