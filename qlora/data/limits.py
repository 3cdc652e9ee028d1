"""Time and memory for chat templates: programs that come with a model, from whoever made it.

transformers runs them in jinja2's sandbox, which keeps them from files, network and the interpreter, but not from
looping for ever or from filling the memory. Both are limited here, in the process itself, as a process of its own for
templates would take seconds to start.

    time    a watchdog thread raises an exception inside the rendering thread: no signal, so any thread may render, on
            any system. Python delivers it between two bytecodes, so one operation in C runs to its end; the one that
            templates have and that hardly ends, `**`, is refused before they run
    memory  while templates run, the process may map so many bytes more than it has mapped; Linux only
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment, TemplateSyntaxError

SECONDS = 10.0  # for one rendering; a long conversation takes milliseconds
MEMORY_BYTES = 2 << 30  # for all that is rendered between two looks
CHARACTERS = 64 << 20  # of one rendering: eight times what a row may be

T = TypeVar("T")


class LimitReached(Exception):
    """The template took more time or memory than any needs; the text says which."""


class _TooLong(BaseException):
    """Raised inside the rendering thread. No Exception, so that nothing between there and here catches it."""


class Limits:
    """Runs functions under both limits, inside a `with`, which may be nested. One thread at a time may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._depth = 0

    def __enter__(self) -> Limits:
        if self._depth == 0:
            self._stop = threading.Event()
            watch = (threading.get_ident(), self._stop, SECONDS / 4)
            threading.Thread(target=self._watch, args=watch, name="qlora-template-limits", daemon=True).start()
            self._restore_memory = _limit_memory(MEMORY_BYTES)
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._restore_memory()
            self._stop.set()

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises. Raises LimitReached."""
        try:
            with self._lock:
                self._deadline = time.monotonic() + SECONDS
            try:
                return function()
            finally:
                self._disarm()
        except _TooLong:
            self._disarm()  # it may have struck in the first one
            raise LimitReached(f"it was not done after {SECONDS:g} s") from None
        except MemoryError:
            raise LimitReached(f"it takes more than {MEMORY_BYTES / 2**30:g} GiB of memory") from None

    def _disarm(self) -> None:
        """Afterwards no exception comes: the watchdog sees no deadline, and one that is on its way is called back."""
        with self._lock:
            self._deadline = None
            _raise_in(threading.get_ident(), None)

    def _watch(self, thread: int, stop: threading.Event, interval: float) -> None:
        # Again and again while the function runs on: an exception that arrives inside a __del__ is lost.
        while not stop.wait(interval):
            with self._lock:
                if self._deadline is not None and time.monotonic() > self._deadline:
                    _raise_in(thread, _TooLong)


def refuse_powers(template: str) -> None:
    """Raise LimitReached where a template has `**`: `9**9**9` is one operation in C, which nothing can interrupt."""
    with contextlib.suppress(TemplateSyntaxError):  # rendering tells of that
        before = ""
        for line, kind, text in Environment().lex(template):
            if kind == "operator" and text == "**" and before not in ("(", ","):  # there it hands on keywords
                raise LimitReached(f"its line {line} raises to a power (`**`), which may take for ever")
            before = before if kind == "whitespace" else text


def _raise_in(thread: int, exception: type[BaseException] | None) -> None:
    """Have `exception` raised in the thread soon, or one that is not yet raised forgotten."""
    what = None if exception is None else ctypes.py_object(exception)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


def _limit_memory(nbytes: int) -> Callable[[], None]:
    """Let the process map `nbytes` more than now, where the system can say and do that; returns what undoes it."""
    try:
        import resource

        # Address space, as that is what can be limited: CUDA maps far more of it than there is memory.
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        if soft == resource.RLIM_INFINITY or soft > mapped + nbytes:
            resource.setrlimit(resource.RLIMIT_AS, (mapped + nbytes, hard))
            return lambda: resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (ImportError, OSError, ValueError):  # Windows, macOS, a container that forbids it
        pass
    return lambda: None
