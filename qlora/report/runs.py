"""Runs: what became of each, from its directory alone, while it goes on or years later.

A run is a directory with `events.jsonl`. What its last events say, whether a process holds its lock and which
checkpoints lie there is looked at; torch is not imported, and of a long log only the end is read.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from qlora.durable import MANIFEST
from qlora.errors import QLoRAError
from qlora.lock import holder
from qlora.redact import redact, redacted
from qlora.report.events import Event, finite
from qlora.report.terminal import printable

__all__ = ["Run", "find_runs", "read_run", "show_runs"]

LOG = "events.jsonl"

State = Literal["running", "finished", "interrupted", "failed", "died", "unreadable"]

_STARTS = b'{"event": "'
_BLOCK = 256 << 10
_MOST = 4 << 20  # bytes of a log's end that are read: over 10,000 steps
_LONGEST = 1 << 20  # bytes of a line; an event has far fewer
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")
_COLOURS = {"running": "cyan", "finished": "green", "interrupted": "yellow"}


@dataclass(frozen=True, slots=True)
class Run:
    """What became of a run.

    state              `running`: a process has its lock. `finished`. `interrupted`: it was asked to stop. `failed`: an
                       error stopped it. `died`: it never said that it ended. `unreadable`: its log is not one
    said               the same for people: `died at step 40`
    step, steps        optimizer steps taken, and of the whole run; 0 before it started
    loss               of the last step; None: there was none
    eval_loss          held-out loss, the last measured; None: there is none in the end of the log that is read
    tokens_per_second  of the whole run where it ended, else of the last step
    checkpoint         name of the newest; one that is whole as far as its name and manifest say. None: there is none
    written            when the log was last written to, unix seconds
    hint               the command that goes on from here, or starts anew where there is no checkpoint; "" while it runs
    """

    directory: str
    state: State
    said: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_second: float | None = None
    checkpoint: str | None = None
    written: float | None = None
    hint: str = ""


def find_runs(directories: Iterable[str | Path]) -> Iterator[Run]:
    """Every run in the directories and below them, by path. Raises QLoRAError where one is not there."""
    seen: set[tuple[int, int]] = set()
    for top in map(Path, directories):
        if not top.is_dir():
            raise QLoRAError(f"{top}: {'is not a directory' if top.exists() else 'no such directory'}")
        closed: list[OSError] = []
        for path, below, files in os.walk(top, onerror=closed.append, followlinks=True):
            try:
                there = os.stat(path)
            except FileNotFoundError:  # removed since
                continue
            if (there.st_dev, there.st_ino) in seen:  # given twice, or a link back up
                below.clear()
                continue
            seen.add((there.st_dev, there.st_ino))
            below[:] = sorted(name for name in below if not name.startswith("."))
            if LOG in files:
                yield read_run(Path(path))
        for error in closed:
            yield Run(str(error.filename), "unreadable", f"cannot be looked into: {error.strerror}")


def read_run(directory: Path) -> Run:
    """What became of the run in a directory; one whose log cannot be read is `unreadable` and says why."""
    log = directory / LOG
    try:
        return _read(directory, log)
    except OSError as error:
        return Run(str(directory), "unreadable", f"cannot be read: {error.strerror or error}")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return Run(str(directory), "unreadable", f"{LOG} is damaged, or not a run's")


def show_runs(directories: Sequence[str], *, as_json: bool = False) -> None:
    """Print the runs below the directories (`outputs`, if none is given), for people or as JSON."""
    looked = directories or [path for path in ("outputs",) if os.path.isdir(path)]
    runs = list(find_runs(looked))
    if as_json:
        print(json.dumps([finite(redacted(asdict(run))) for run in runs], indent=2, allow_nan=False))
        return
    console = Console(highlight=False)

    def text(shown: str, style: str = "") -> Text:
        return Text(printable(redact(shown), console.encoding), style)

    if not runs:
        console.print(text(f"no runs in {', '.join(map(str, directories)) or 'outputs'}"), soft_wrap=True)
    for number, run in enumerate(runs):
        console.print(text("\n" * bool(number) + run.directory, "bold"), soft_wrap=True)
        facts = Text(", ").join([text(run.said, _COLOURS.get(run.state, "red")), *map(text, _facts(run))])
        if console.is_terminal:
            console.print(Padding(facts, (0, 0, 0, 2), expand=False))
        else:
            console.print(Text("  ") + facts, soft_wrap=True)
        if run.hint:
            console.print(text(f"  {run.hint}", "dim"), soft_wrap=True)


def _read(directory: Path, log: Path) -> Run:
    ended, start, step, evaluation = _last_events(log)
    taken = ended or step
    number = int(taken["step"] if taken else start["first_step"] if start else 0)
    checkpoint = _newest_checkpoint(directory)
    state, said = _state(ended, number, start is not None)
    held = holder(directory)
    if held is not None:
        state, said = "running", f"running ({held})"
    return Run(
        directory=str(directory),
        state=state,
        said=said,
        step=number,
        steps=int(start["steps"]) if start else 0,
        loss=float(step["loss"]) if step else None,
        eval_loss=float(evaluation["eval_loss"]) if evaluation else None,
        tokens_per_second=float(taken["tokens_per_second"]) if taken else None,
        checkpoint=checkpoint,
        written=log.stat().st_mtime,
        hint=_hint(directory, state, checkpoint),
    )


def _state(ended: Event | None, step: int, started: bool) -> tuple[State, str]:
    if ended is None:
        return "died", f"died at step {step:,}" if started else "died before its first step"
    if ended["stopped"] is None:
        return "finished", "finished"
    if ended["stopped"] == "interrupted":
        return "interrupted", f"interrupted at step {step:,}"
    return "failed", f"failed at step {step:,}: {str(ended['stopped'])[:200]}"


def _hint(directory: Path, state: str, checkpoint: str | None) -> str:
    if state == "running":
        return ""
    if state == "finished":
        return shlex.join(["qlora", "generate", str(directory)]) + " PROMPT"
    recipe = directory / "recipe.yaml"
    told = shlex.quote(str(recipe)) if recipe.is_file() else "RECIPE"
    return f"qlora train {told} --resume" if checkpoint else f"qlora train {told}"


def _newest_checkpoint(directory: Path) -> str | None:
    found = [
        (int(match[1]), path.name)
        for path in directory.iterdir()
        if (match := _CHECKPOINT.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return max(found)[1] if found else None


def _last_events(log: Path) -> tuple[Event | None, Event | None, Event | None, Event | None]:
    """What still holds at a log's end: the end (None: it was started again since, or never ended), the start, and
    the last step and evaluation, as in `events.timeline`: a start takes back what was said of steps after it."""
    ended = start = step = evaluation = None
    first = math.inf  # a step after this one was taken back
    for kind, line in _backwards(log):
        if kind == b"end" and ended is None and start is None:
            ended = _event(line)
        elif kind == b"start":
            began = _event(line)
            start, first = start or began, min(first, began["first_step"])
        elif kind == b"step" and step is None:
            step = _unless_after(first, _event(line))
        elif kind == b"evaluation" and evaluation is None:
            evaluation = _unless_after(first, _event(line))
        if first == 0 or (start and step and evaluation):
            break
    return ended, start or _first_start(log), step, evaluation


def _unless_after(step: float, event: Event) -> Event | None:
    return event if event["step"] <= step else None


def _backwards(log: Path) -> Iterator[tuple[bytes, bytes]]:
    """The whole lines of a log's end, the last first, each with the kind of its event. Raises ValueError."""
    with log.open("rb") as file:
        at = size = file.seek(0, os.SEEK_END)
        rest = b""  # of a line that starts further to the front
        torn = True  # the last line, until its end is found: it may not have been written to that
        while at > max(0, size - _MOST):
            block = min(_BLOCK, at)
            at -= block
            file.seek(at)
            read = file.read(block) + rest
            if torn:
                end = read.rfind(b"\n")
                if end < 0:
                    continue
                read, torn = read[:end], False
            lines = read.split(b"\n")
            rest = lines.pop(0) if at else b""
            if len(rest) > _LONGEST:
                raise ValueError(f"a line of over {_LONGEST} bytes")
            for line in reversed(lines):
                yield _kind(line), line


def _first_start(log: Path) -> Event | None:
    """The start of a log so long that its end has none."""
    with log.open("rb") as file:
        for line in iter(lambda: file.readline(_LONGEST), b""):
            if file.tell() > _MOST or not line.endswith(b"\n"):
                return None
            if _kind(line) == b"start":
                return _event(line)
    return None


def _kind(line: bytes) -> bytes:
    if not line.startswith(_STARTS):
        raise ValueError("not an event")
    return line[len(_STARTS) : line.index(b'"', len(_STARTS))]


def _event(line: bytes) -> Event:
    event = json.loads(line)
    if not isinstance(event, dict):
        raise ValueError("not an event")
    return event


def _facts(run: Run) -> Iterator[str]:
    if run.steps:
        # A run that was resumed with a smaller max_steps has taken more.
        yield f"{run.step:,} of {run.steps:,} steps" if run.step <= run.steps else f"{run.step:,} steps"
    if run.loss is not None:
        yield f"loss {run.loss:.4f}"
    if run.eval_loss is not None:
        yield f"held out {run.eval_loss:.4f}"
    if run.tokens_per_second is not None:
        yield f"{run.tokens_per_second:,.0f} tokens/s"
    if run.checkpoint is not None:
        yield run.checkpoint
    elif run.state in ("interrupted", "failed", "died"):
        yield "no checkpoint"
    if run.written is not None:
        yield _age(time.time() - run.written)


def _age(seconds: float) -> str:
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            number = int(seconds // size)
            return f"{number} {unit}{'s' if number > 1 else ''} ago"
    return "just now"
