"""Events: what a run says about itself, once, to everyone who listens.

An event is a plain dict that JSON can hold. `event` is its kind, `time` is when, in unix seconds.

    plan        lines (five, for people: what it takes, time, choices, what limits it, what the figures rest on),
                device_bytes (at the peak, the allocator's slack and the context included), host_bytes, file_bytes,
                seconds (an optimizer step), tokens_per_second, memory (the recipe's section as chosen: {key: value}),
                calibrated (whether by earlier runs on this machine). Comes before its start
    start       steps (optimizer steps of the whole run), first_step (0, or the step resumed from), method, model,
                order ("layer-major" | "standard"), parameters, trainable, four_bit_share (0..1), base_gib,
                load_seconds, from_cache (whether it had been quantized before), layers ({device, host, file}: how many
                live where), device, optimizer, rows, tokens_per_epoch, supervised_per_epoch, epochs (null: as
                many as the steps take)
    step        step (from 1), epoch, loss, learning_rate, grad_norm, tokens (so far), supervised (this step),
                step_seconds, tokens_per_second, memory_gib
    evaluation  step, eval_loss, eval_tokens, seconds
    generation  step (0 before training), exact_match (0..1), rows, correct, seconds,
                samples: [{prompt, expected, got}]
    checkpoint  step, path, seconds
    notice      text: a decision worth a line
    end         step, seconds, tokens, tokens_per_second, peak_memory_gib, memory_kind ("host RSS" | "VRAM"),
                output_dir, stopped (null | "interrupted" | what went wrong), and where the run was planned
                planned: {device_bytes (what peak_memory_gib should be; null: not planned), seconds (an optimizer step)}
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from qlora.errors import QLoRAError, TrainingError
from qlora.redact import redacted

Event = dict[str, Any]
Sink = Callable[[Event], None]  # one that has to be closed has a close() too

_LONGEST = 1 << 20  # bytes of a line; an event has far fewer
_MOST = 32 << 20  # bytes of a log that are held as events, in some six times the memory: 100,000 steps


class Degraded(Exception):
    """Raised by a sink that goes on with less. The run goes on too, and the text is told to every sink as a notice."""


class Events:
    """Sends each event to all sinks, in their order.

    A sink that fails keeps nobody else from an event: the others get it first, then the failure is raised and ends the
    run, because a run that cannot be logged or seen is not the one that was asked for. What a run can do without (a
    tracker's server, a reader at the other end of a pipe) is for the sink to say, by raising `Degraded`.
    """

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = list(sinks)

    def emit(self, kind: str, /, **fields: Any) -> Event:
        """Stamp the time, send, return the event. No sink is told a secret."""
        event = {"event": kind, "time": time.time(), **redacted(fields)}
        notices: list[str] = []
        failure: Exception | None = None
        for sink in self._sinks:
            try:
                sink(event)
            except Degraded as lost:
                notices.append(str(lost))
            except Exception as error:
                if failure is None:
                    failure = error
                else:
                    failure.add_note(f"another sink failed as well: {type(error).__name__}: {error}")
        for text in notices:
            self.emit("notice", text=text)
        if failure is not None:
            raise failure
        return event

    def close(self) -> None:
        """Close the sinks, the last first; the ones before it can still be told that this failed."""
        with ExitStack() as stack:
            for _ in self._sinks:
                stack.callback(self._close_last)

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_last(self) -> None:
        close = getattr(self._sinks.pop(), "close", None)
        try:
            if close is not None:
                close()
        except Degraded as lost:
            self.emit("notice", text=str(lost))


class EventLog:
    """The sink that is a file: one line of strict JSON an event, flushed, so that a killed run has said all it did.

    JSON has no word for a number that is not finite; it is written as "nan", "inf" or "-inf", which float() reads.
    An existing log is continued. If the process that wrote it died inside a line, that line is cut off first. One with
    something else in it is set aside, and continued from before that.

    set_aside  where such a log lies now, whole; None: there was none

    Raises TrainingError where the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.set_aside: Path | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._continued()
        except OSError as error:
            raise self._unwritable(error) from error

    def __call__(self, event: Event) -> None:
        line = json.dumps(finite(event), ensure_ascii=False, allow_nan=False)
        try:
            # Half a surrogate pair, as a model can emit it, has no UTF-8; Python's escape for it is JSON's too.
            self._file.write(line.encode("utf-8", "backslashreplace") + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        self._file.close()

    def _continued(self) -> BinaryIO:
        """The file, opened behind its last event."""
        end = 0
        try:
            for behind, _ in _events(self.path):
                end = behind
        except FileNotFoundError:
            pass
        except _NoEvent:
            self.set_aside = self.path.with_name(f"{self.path.name}.damaged")
            os.replace(self.path, self.set_aside)
            with self.set_aside.open("rb") as whole, self.path.open("wb") as begun:
                for at in range(0, end, _LONGEST):
                    begun.write(whole.read(min(_LONGEST, end - at)))
            from qlora.durable import sync  # here: pydantic comes with it

            sync(self.path.parent)
        file = self.path.open("ab")
        file.truncate(end)
        return file

    def _unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(f"{self.path}: the event log cannot be written: {error.strerror or error}")


def read_events(path: str | Path) -> list[Event]:
    """All events of a log in the order they were written, without a last line that was not finished.

    Raises QLoRAError naming file and line.
    """
    try:
        return [event for _, event in _events(Path(path))]
    except OSError as error:
        raise QLoRAError(f"{path}: the event log cannot be read: {error.strerror or error}") from error
    except _NoEvent as error:
        raise QLoRAError(str(error)) from None


def readable_events(path: str | Path) -> tuple[list[Event], str | None]:
    """A log's events up to where it cannot be read any further, and why not; None: these are all. It never fails."""
    events: list[Event] = []
    try:
        for end, event in _events(Path(path)):
            if end > _MOST:
                return events, f"{path}: has over {_MOST >> 20} MiB; only its beginning is read"
            events.append(event)
    except OSError as error:
        return events, f"{path}: the event log cannot be read: {error.strerror or error}"
    except _NoEvent as error:
        return events, str(error)
    return events, None


def timeline(events: Iterable[Event]) -> list[Event]:
    """The events that still hold, of a log that several attempts wrote to.

    A start takes back what earlier attempts said of the steps after its first_step; one from step 0 takes back all.
    """
    kept: list[Event] = []
    for event in events:
        if event["event"] == "start":
            first = event["first_step"]
            plans = [earlier for earlier in kept if earlier["event"] == "plan"]
            others = [earlier for earlier in kept if earlier["event"] != "plan" and earlier.get("step", 0) <= first]
            kept = [*(others if first else []), *plans[-1:]]  # an attempt's plan came before its start
        kept.append(event)
    return kept


def steps(events: Iterable[Event]) -> list[Event]:
    """The step events that still hold, the newest for each step, by step."""
    newest = {event["step"]: event for event in timeline(events) if event["event"] == "step"}
    return [newest[step] for step in sorted(newest)]


def due(step: int, last: int, logging_steps: int) -> bool:
    """Whether a sink that tells only some steps tells this one: every `logging_steps`-th, and the last."""
    return step % logging_steps == 0 or step == last


class _NoEvent(ValueError):
    """The text says where."""


def _events(path: Path) -> Iterator[tuple[int, Event]]:
    """Each event of a log, a line at a time, with where its line ends. Raises OSError and _NoEvent."""
    with path.open("rb") as file:
        end = 0
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
            if not line.endswith(b"\n") and len(line) < _LONGEST:
                return  # not finished
            event = _event(line)
            if event is None:
                raise _NoEvent(f"{path}:{number}: is not an event")
            end += len(line)
            yield end, event


def _event(line: bytes) -> Event | None:
    """What a line holds, if it has what must be known of any event to tell which ones still hold."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    counted = {"step": "step", "start": "first_step"}.get(event["event"])
    for key in ("step", "first_step"):
        number = event.get(key)
        if (key in event or key == counted) and not (type(number) is int and number >= 0):
            return None
    return event


def finite(value: Any) -> Any:
    """What strict JSON can hold: a number that is not finite as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value
