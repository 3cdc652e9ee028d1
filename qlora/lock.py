"""One process at a time in a directory. The system takes the lock back from a process that dies, however it dies."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

FILE = ".lock"
_PATIENCE = 0.5  # seconds; `holder` has the lock for a moment when it looks


class Locked(Exception):
    """Another process has the lock. holder: what it wrote of itself, as in `holder`."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class Lock:
    """Held from its making until `release`, or the end of the process.

    Raises Locked, and OSError where the directory cannot be written. Where the file system knows no locks, everybody
    gets it.
    """

    def __init__(self, directory: Path) -> None:
        self._path, until = directory / FILE, time.monotonic() + _PATIENCE
        while True:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            try:
                if _take(self._fd) and self._is_there():
                    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
                    os.ftruncate(self._fd, 0)
                    os.write(self._fd, json.dumps(about).encode())
                    return
                if time.monotonic() > until:
                    raise Locked(_said(self._fd))
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)
            time.sleep(0.05)

    def release(self) -> None:
        """Let others have it; the file goes. A second call does nothing."""
        if self._fd >= 0:
            with suppress(OSError):  # Windows keeps files that are open
                self._path.unlink()
            os.close(self._fd)
            self._fd = -1

    def _is_there(self) -> bool:
        """Whether what was locked still has the name: who had it before may have taken the file away meanwhile."""
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def holder(directory: Path) -> str | None:
    """Who has a directory's lock: `process 4711 on host since 10:15`; None where nobody has."""
    try:
        fd = os.open(directory / FILE, os.O_RDWR | getattr(os, "O_BINARY", 0))
    except OSError:
        return None
    try:
        return None if _take(fd) else _said(fd)
    finally:
        os.close(fd)


def _take(fd: int) -> bool:
    """Try to get the lock; without waiting."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(fd, 1 << 20, os.SEEK_SET)  # a byte past the text, as what is locked cannot be read
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            os.lseek(fd, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True


def _said(fd: int) -> str:
    """What the holder wrote."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        os.lseek(fd, 0, os.SEEK_SET)
        about = json.loads(os.read(fd, 4096))
        since = time.strftime("%H:%M", time.localtime(float(about["since"])))
        return f"process {int(about['pid'])} on {about['host']} since {since}"
    return "another process"
