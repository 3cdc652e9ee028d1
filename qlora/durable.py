"""What is to outlive a crash: files and directories that are whole or not there, and known to be what was written.

    with new_directory(place) as draft:       # .<name>.<pid>.unfinished, beside its place
        draft.write("state.json", content)    # each file brought to the disk, and hashed as it goes by
                                              # then the manifest, the directory, the rename, and the directory above

Power may fail between any two of these: what stands under the final name has all its bytes on the disk, and a manifest
that says what they are. `verify` reads them back. A manifest names plain files beside itself and nothing else, as it
may come from anyone who can write there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from qlora.errors import MachineError

__all__ = [
    "FILE_NAME",
    "MANIFEST",
    "UNFINISHED",
    "Damaged",
    "Draft",
    "FileRecord",
    "Writer",
    "disk_error",
    "free_disk_bytes",
    "new_directory",
    "new_files",
    "readable",
    "replace_file",
    "sync",
    "verify",
]

FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,200}$"  # of one file, in no other directory
MANIFEST = "manifest.json"
UNFINISHED = ".*.unfinished"  # what a killed process leaves beside the place of a directory or file

_CHUNK = 4 << 20
_MOST_MANIFEST = 1 << 20  # bytes; a thousand files take a tenth of it


class FileRecord(BaseModel):
    """What a manifest says of a file. size: bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Annotated[int, Field(ge=1, le=1)] = 1
    files: dict[Annotated[str, StringConstraints(pattern=FILE_NAME)], FileRecord]


class Damaged(ValueError):
    """What is in a directory is not what was written there; the text says in which way."""


class Writer:
    """Writes one new file from its start to its end, and hashes what goes by. Raises OSError."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._fd, self._digest, self._size = os.open(path, flags, 0o666), hashlib.sha256(), 0

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes, all of them."""
        view = memoryview(content)
        self._digest.update(view)
        self._size += len(view)
        while view:
            view = view[os.write(self._fd, view[:_CHUNK]) :]

    def _finish(self) -> FileRecord:
        os.fsync(self._fd)
        return FileRecord(size=self._size, sha256=self._digest.hexdigest())

    def _close(self) -> None:
        os.close(self._fd)


class Draft:
    """A directory that is being written.

    path  where it is meanwhile
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, FileRecord] = {}

    @contextmanager
    def writer(self, name: str) -> Iterator[Writer]:
        """A new file, that is on the disk when the context ends."""
        writer = Writer(self.path / name)
        try:
            yield writer
            self._files[name] = writer._finish()
        finally:
            writer._close()

    def write(self, name: str, content: bytes) -> None:
        """A new file with this content."""
        with self.writer(name) as writer:
            writer.write(content)

    def adopt(self) -> dict[str, FileRecord]:
        """Bring to the disk what others have written into `path`; returns all files so far, by name."""
        for path in sorted(self.path.iterdir()):
            if path.name not in self._files:
                sync(path)
                self._files[path.name] = FileRecord(size=path.stat().st_size, sha256=_sha256(path))
        return dict(self._files)

    def seal(self) -> dict[str, FileRecord]:
        """Write the manifest; returns what it says. Nothing is added after this."""
        manifest = _Manifest(files=self._files)
        self.write(MANIFEST, manifest.model_dump_json().encode())  # no byte of it that does not matter
        sync(self.path)
        return manifest.files


@contextmanager
def new_directory(place: Path) -> Iterator[Draft]:
    """Write a directory that is at `place` when the context ends, and not before; what was there is gone then.

    Raises OSError, and leaves what was there. So does whatever is raised inside.
    """
    draft = Draft(_unfinished(place))
    old = draft.path.with_name(f"{draft.path.name}.old.unfinished")
    try:
        draft.path.mkdir(parents=True)
        yield draft
        draft.seal()
        if os.path.lexists(place):
            os.rename(place, old)  # a directory replaces nothing
        try:
            os.rename(draft.path, place)
        except BaseException:
            if os.path.lexists(old):
                os.rename(old, place)
            raise
        sync(place.parent)
    finally:
        for leftover in (draft.path, old):
            _remove(leftover)


@contextmanager
def new_files(directory: Path, last: str) -> Iterator[Draft]:
    """Write files that stand in `directory`, beside what is there already, when the context ends, and not before.

    last  the file by which one knows that the others are there and whole: it goes first and comes last

    Raises OSError, and leaves what was there, without `last` if it came to replacing; as does what is raised inside.
    """
    draft = Draft(_unfinished(directory / last))
    try:
        draft.path.mkdir(parents=True)
        yield draft
        draft.adopt()
        sync(draft.path)
        (directory / last).unlink(missing_ok=True)
        sync(directory)
        names = sorted(path.name for path in draft.path.iterdir())
        for name in sorted(names, key=lambda name: name == last):
            if name == last:
                sync(directory)
            os.chmod(draft.path / name, (draft.path / last).stat().st_mode)  # libraries have ideas of their own
            os.replace(draft.path / name, directory / name)
        sync(directory)
    finally:
        shutil.rmtree(draft.path, ignore_errors=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that has all of its new content at every moment from when it is there. Raises OSError."""
    unfinished = _unfinished(path)
    try:
        unfinished.unlink(missing_ok=True)
        writer = Writer(unfinished)
        try:
            writer.write(content)
            writer._finish()
        finally:
            writer._close()
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def verify(directory: Path) -> dict[str, FileRecord]:
    """Read back a directory that `new_directory` wrote; returns what its manifest says. Raises Damaged."""
    path = directory / MANIFEST
    try:
        if not S_ISREG(path.lstat().st_mode):
            raise Damaged(f"{MANIFEST} is not a file")
        with path.open("rb") as f:
            raw = f.read(_MOST_MANIFEST + 1)
        if len(raw) > _MOST_MANIFEST:
            raise Damaged(f"{MANIFEST} has over {_MOST_MANIFEST:,} bytes")
        files = _Manifest.model_validate_json(raw).files
    except FileNotFoundError:
        raise Damaged(f"has no {MANIFEST}") from None
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error.strerror or error}") from error
    except (ValidationError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} is damaged") from error
    for name, record in files.items():
        try:
            there = (directory / name).lstat()
            if not S_ISREG(there.st_mode):
                raise Damaged(f"{name} is not a file")
            if there.st_size != record.size:
                raise Damaged(f"{name} has {there.st_size:,} bytes, {record.size:,} were written")
            if _sha256(directory / name) != record.sha256:
                raise Damaged(f"{name} is not what was written (its SHA-256 differs)")
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror or error}") from error
    return files


def sync(path: Path) -> None:
    """Have the system bring a file, or a directory's names, to the disk now."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such call for directories
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_disk_bytes(path: Path) -> int:
    """Bytes that can be written at `path`, which need not be there yet."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def disk_error(path: Path, error: OSError, nbytes: int, advice: str) -> MachineError:
    """The error for a disk that does not take `nbytes` bytes at `path`; with the numbers, where it is full.

    advice  what to do, whatever the disk has against it
    """
    numbers = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        numbers = f" (needs {readable(nbytes)}, {readable(_free(path))} are free)"
    return MachineError(f"{path}: cannot be written: {error.strerror or error}{numbers}\n  {advice}")


def readable(nbytes: int) -> str:
    """Bytes for people: `1.25 GiB`, `3.4 MiB`."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.1f} MiB"


def _free(path: Path) -> int:
    try:
        return free_disk_bytes(path)
    except OSError:
        return 0


def _remove(path: Path) -> None:
    """A directory, a file or a link, as well as can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _unfinished(place: Path) -> Path:
    """A name beside it. Of a killed process with our number the leftover goes."""
    path = place.with_name(f".{place.name}.{os.getpid()}.unfinished")
    _remove(path)
    return path


def _sha256(path: Path) -> str:
    """Of a file as it stands on the disk, not in the system's memory, where that can be asked for."""
    with path.open("rb", buffering=0) as f:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # pages that are on the disk already
        return hashlib.file_digest(f, "sha256").hexdigest()
