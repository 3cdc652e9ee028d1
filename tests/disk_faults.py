"""Faults at any call that changes a disk: full, interrupted, or the process dead in the middle of it."""

import errno
import os
from contextlib import contextmanager

CALLS = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir")  # all that changes a disk


class Calls:
    """Counts the calls that change a disk, and does something at one of them."""

    def __init__(self, at: int = -1, then=None) -> None:
        self.at, self.then, self.names = at, then, []

    @contextmanager
    def heard(self):
        real = {name: getattr(os, name) for name in CALLS}

        def wrapped(name):
            def call(*arguments, **keywords):
                if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
                    return real[name](*arguments, **keywords)  # reads change nothing
                self.names.append(name)
                if len(self.names) - 1 == self.at:
                    if name == "write":  # a part of it is on the disk already
                        real[name](arguments[0], arguments[1][: len(arguments[1]) // 2])
                    self.then()
                return real[name](*arguments, **keywords)

            return call

        for name in CALLS:
            setattr(os, name, wrapped(name))
        try:
            yield self
        finally:
            for name in CALLS:
                setattr(os, name, real[name])


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ctrl_c():
    raise KeyboardInterrupt


def die():
    os._exit(9)  # nothing is cleaned up, as under SIGKILL


def in_a_child(work) -> int:
    """Do it in a fork; returns its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
