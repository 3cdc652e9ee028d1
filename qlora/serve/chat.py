"""`qlora chat`: a conversation at the terminal, in which the one who answers can be changed at any turn.

Lines come from the standard input, typed or piped. Ctrl-C stops an answer and not the program; what was said until then
stays in the conversation.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora.errors import QLoRAError
from qlora.live import BASE, Live
from qlora.redact import redact
from qlora.report.terminal import printable

_HELP = (
    ("/use NAME", "that adapter answers from here on"),
    ("/base", "the base answers, without an adapter"),
    ("/compare", "the last question to the base and to each adapter, side by side"),
    ("/compare TEXT", "the same with another question; the conversation stays as it is"),
    ("/reset", "forget what was said"),
    ("/help", "this"),
    ("/quit", "leave; so does the end of the input"),
)
_NARROWEST = 24  # columns of an answer that still reads well beside another


def chat(
    adapters: Mapping[str, Path],
    *,
    max_new_tokens: int = 256,
    system: str | None = None,
    temperature: float = 0.0,
    seed: int | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Talk on standard input and output until the input ends. The first adapter begins.

    Raises as `Live.load` does.
    """
    console = Console()
    with Live.load(adapters, base=base, trust_remote_code=trust_remote_code) as live:
        how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        Session(live, sys.stdin, console, system, **how).run()


class Session:
    """One conversation. A line that begins with / is a command, any other is a turn.

    messages  what was said so far, the system's turn first where there is one
    """

    def __init__(self, live: Live, lines: TextIO, console: Console, system: str | None = None, **how: Any) -> None:
        """lines: what the user says. how: what a Question has beside the prompt."""
        self.live, self.console = live, console
        self._lines, self._how = lines, how
        self._typed = lines is sys.stdin and lines.isatty()
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._system)

    def run(self) -> None:
        """Until /quit or the end of the input."""
        if self._typed:
            with suppress(ImportError):
                import readline  # noqa: F401 - input() then has a history and can be edited
            self._say(f"{', '.join(self.live.names)} on one base; /help says what there is to type")
        while (line := self._read()) is not None:
            line = line.strip()
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self._command(*line.split(maxsplit=1))
                elif line:
                    self._turn(line)
            except QLoRAError as error:
                self._say(redact(error.report()), "red")

    def _read(self) -> str | None:
        """The next line; None at the end."""
        if not self._typed:
            return self._lines.readline() or None
        while True:
            try:
                return input(f"{self._who()}> ")
            except EOFError:
                self.console.print()
                return None
            except KeyboardInterrupt:
                self._say("\n/quit leaves")

    def _command(self, command: str, rest: str = "") -> None:
        match command, rest.strip():
            case ("/use", name) if name:
                self._use(None if name == BASE else name)
            case ("/base", ""):
                self._use(None)
            case ("/compare", asked):
                self._compare(asked)
            case ("/reset", ""):
                self.messages = list(self._system)
                self._say("forgotten")
            case ("/help", ""):
                table = Table.grid(padding=(0, 2))
                for name, said in _HELP:
                    table.add_row(Text(name, style="bold"), said)
                self.console.print(table)
            case _:
                self._say(f"{command}: no such command, or not used so; /help", "red")

    def _use(self, name: str | None) -> None:
        started = time.perf_counter()
        self.live.use(name)
        self._say(f"{self._who()} answers (switched in {1000 * (time.perf_counter() - started):.0f} ms)")

    def _turn(self, text: str) -> None:
        asked = [*self.messages, {"role": "user", "content": text}]

        def tell(piece: str) -> None:
            self.console.print(Text(self._plain(piece)), end="", soft_wrap=True)

        with _stoppable() as requested:
            try:
                answer = self.live.answer(asked, on_text=tell, requested=requested, **self._how)
            finally:
                self.console.print()
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        if answer.ended != "stop":
            why = "stopped" if answer.ended == "cut" else f"cut off at {answer.tokens:,} tokens: --max-new-tokens"
            self._say(f"({why})")

    def _compare(self, text: str) -> None:
        """One question, in the conversation as it was before it, to all; whoever was in use is so again."""
        before = self.messages
        if not text:
            asked = [i for i, turn in enumerate(before) if turn["role"] == "user"]
            if not asked:
                self._say("nothing was asked yet: /compare TEXT")
                return
            text, before = before[asked[-1]]["content"], before[: asked[-1]]
        prompt = [*before, {"role": "user", "content": text}]
        in_use = self.live.active
        said: dict[str, str] = {}
        with _stoppable() as requested:
            try:
                for name in ([None] if self.live.has_base else []) + list(self.live.names):
                    if requested():
                        break
                    self.live.use(name)
                    said[name or BASE] = self._compared(prompt, requested)
            finally:
                self.live.use(in_use)
        self._side_by_side(said)

    def _compared(self, prompt: list[dict[str, str]], requested: Callable[[], bool]) -> str:
        try:
            return self.live.answer(prompt, requested=requested, **self._how).text
        except QLoRAError as error:  # such as a base without a chat template; the others can answer
            return redact(error.report())

    def _side_by_side(self, said: Mapping[str, str]) -> None:
        if self.console.width < _NARROWEST * len(said):
            for name, text in said.items():
                self.console.print(Text(name, style="bold"))
                self.console.print(Text(self._plain(text)))
            return
        table = Table(expand=True, show_lines=False)
        for name in said:
            table.add_column(Text(name, style="bold"), ratio=1, overflow="fold")
        table.add_row(*(Text(self._plain(text)) for text in said.values()))
        self.console.print(table)

    def _who(self) -> str:
        return self.live.active or BASE

    def _say(self, text: str, style: str = "dim") -> None:
        self.console.print(Text(self._plain(text), style=style), soft_wrap=True)

    def _plain(self, text: str) -> str:
        return printable(text, self.console.encoding)


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Turns a first Ctrl-C into an answer; a second one interrupts, as ever."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield asked.is_set
        return

    def note(number: int, frame: Any) -> None:
        if asked.is_set():
            signal.default_int_handler(number, frame)
        asked.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
