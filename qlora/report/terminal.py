"""The terminal: what a person sees of a run.

On a terminal, a block that says what is about to happen, a progress bar, and a line for each thing worth one. In a
pipe or a CI log, the same without a bar: one plain line every `logging_steps` steps and no control codes. At the end
the loss curve, what the model answered before and after, and what it took.
"""

from __future__ import annotations

import math
import time
import unicodedata
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import count, pairwise
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.text import Text

from qlora.machine import GIB
from qlora.report.events import Degraded, Event, due, timeline

_PACE = 20  # steps whose mean duration the time left is reckoned from
_SAMPLES = 3
_SAMPLE_LINES = 6  # lines of a sample's text that are shown; of a longer one the middle is left out
_PLAN = ("memory", "time", "choices", "limit", "figures")  # names of a plan's lines
_FIGURES = 62  # columns of what stands beside the bar


class _Signs(NamedTuple):
    right: str
    wrong: str
    to: str
    cut: str


_UNICODE = _Signs("✓", "✗", "→", "…")
_ASCII = _Signs("ok", "no", "->", "...")


class Terminal:
    """The sink that prints.

    console        where to; by default the standard output
    logging_steps  optimizer steps between two lines where there is no progress bar
    history        events of earlier attempts at this run, for a run that is resumed: they belong to its curve and to
                   its before and after

    When what it prints to goes away (a pipe's reader that has seen enough), the run goes on without it.
    """

    def __init__(self, console: Console | None = None, logging_steps: int = 1, history: Iterable[Event] = ()) -> None:
        self.console = console or Console()
        self.logging_steps = logging_steps
        self._signs = _ASCII if self.console.options.ascii_only else _UNICODE
        self._history = list(history)
        self._last_step = 0
        self._losses: dict[int, float] = {}
        self._held_out: list[tuple[int, float]] = []  # step and loss of the first and the last evaluation
        self._generations: list[Event] = []  # the first and the last
        self._pace: deque[float] = deque(maxlen=_PACE)
        self._bar: Progress | None = None
        self._gone = False  # nobody reads what is printed

    def __call__(self, event: Event) -> None:
        self._remember(event)
        show = {
            "plan": self._plan,
            "start": self._start,
            "step": self._step,
            "evaluation": self._evaluation,
            "generation": self._generation,
            "checkpoint": self._checkpoint,
            "notice": self._notice,
            "end": self._end,
        }.get(event["event"])
        try:
            if show is not None and not self._gone:
                show(event)
        except (SystemExit, OSError) as error:  # the first is what rich makes of a broken pipe
            self._gone = True
            self.close()
            raise Degraded("nobody reads the standard output any more; the run goes on without it") from error

    def close(self) -> None:
        """Leave the terminal as it was, whether the run came to its end or not."""
        if self._bar is not None:
            with suppress(OSError, SystemExit):  # a window that was closed
                self._bar.stop()
            self._bar = None

    # What the summary will need

    def _remember(self, event: Event) -> None:
        match event:
            case {"event": "start"}:
                for earlier in timeline([*self._history, event]):
                    if earlier["event"] != "start":
                        self._remember(earlier)
                self._history = []
                self._pace.clear()  # another attempt's, maybe another machine's
                self._last_step = event["steps"]
            # Of earlier attempts a file tells, and what it lacks is not remembered.
            case {"event": "step", "step": int(step), "loss": loss}:
                self._losses[step] = _number(loss)
                self._pace.append(_number(event.get("step_seconds")))
            case {"event": "evaluation", "step": int(step), "eval_loss": loss}:
                self._held_out = [*self._held_out[:1], (step, _number(loss))]
            case {
                "event": "generation",
                "step": int(),
                "exact_match": float() | int(),
                "rows": int(),
                "correct": int(),
                "samples": [*samples],
            } if all(map(_is_sample, samples)):
                self._generations = [*self._generations[:1], event]

    # One method for each kind of event

    def _plan(self, event: Event) -> None:
        self._print(Text("\nPlan", style="bold"))
        for name, line in zip(_PLAN, event["lines"], strict=False):
            self._named(name, line)

    def _start(self, event: Event) -> None:
        trained, parameters = event["trainable"], event["parameters"]
        where = f", from step {event['first_step']:,} on" if event["first_step"] else ""
        self._print(Text(self._plain(f"\n{event['model']}"), style="bold"))
        self._named(
            "base",
            f"{_short(parameters)} parameters, {event['four_bit_share']:.1%} of them in 4 bits, "
            f"{event['base_gib']:.2f} GiB, loaded in {event['load_seconds']:.1f} s"
            + (" from the NF4 cache" if event["from_cache"] else ""),
        )
        if event["layers"]["host"] or event["layers"]["file"]:
            self._named("layers", ", ".join(f"{n} on {tier}" for tier, n in event["layers"].items() if n))
        share = f"{_short(trained)} parameters ({_share(trained, parameters)})"
        self._named("trained", f"{share}, {event['method']}, {event['optimizer']}")
        self._named(
            "data",
            f"{event['rows']:,} rows, {event['tokens_per_epoch']:,} tokens an epoch, "
            f"{event['supervised_per_epoch']:,} of them supervised",
        )
        epochs = "" if event["epochs"] is None else f" in {event['epochs']:g} epochs"
        steps = f"{event['steps']:,} steps{epochs}{where}"
        self._named("run", f"{steps}, {event['order']}, on {event['device']}")
        self._print(Text())
        if self.console.is_interactive:
            width = max(8, min(40, self.console.width - _FIGURES))
            self._bar = Progress(BarColumn(bar_width=width), _Figures(), console=self.console, refresh_per_second=4)
            self._bar.add_task("", total=event["steps"], completed=event["first_step"], step=None, left=0.0)
            self._bar.start()

    def _step(self, event: Event) -> None:
        step = event["step"]
        left = (self._last_step - step) * sum(self._pace) / len(self._pace)
        if self._bar is not None:
            now = time.monotonic()
            self._bar.update(self._bar.task_ids[0], completed=step, step=event, left=now + left, refresh=True)
        elif due(step, self._last_step, self.logging_steps):
            norm = "" if event["grad_norm"] is None else f"  grad norm {event['grad_norm']:<7.3f}"
            self._line(
                f"{self._at(step)}/{self._last_step}  loss {event['loss']:<7.4f}  lr {event['learning_rate']:.2e}{norm}"
                f"  {event['tokens_per_second']:,.0f} tokens/s  {event['memory_gib']:.2f} GiB  {_clock(left)} left"
            )

    def _evaluation(self, event: Event) -> None:
        about = f"({event['eval_tokens']:,} tokens, {event['seconds']:.1f} s)"
        self._line(f"{self._at(event['step'])}  held-out loss {event['eval_loss']:.4f}", about)

    def _generation(self, event: Event) -> None:
        about = f"({event['correct']:,} of {event['rows']:,}, {event['seconds']:.1f} s)"
        self._line(f"{self._at(event['step'])}  held-out exact match {event['exact_match']:.1%}", about)

    def _checkpoint(self, event: Event) -> None:
        self._line(f"{self._at(event['step'])}  checkpoint {event['path']}", f"({event['seconds']:.1f} s)")

    def _notice(self, event: Event) -> None:
        self._print(Text(self._plain(f"note: {event['text']}"), style="yellow"), soft_wrap=True)

    def _end(self, event: Event) -> None:
        self.close()
        self._curve()
        self._held_out_summary()
        self._samples()
        self._result(event)

    # The parts of the summary

    def _curve(self) -> None:
        first, last = min(self._losses, default=1), max(self._losses, default=0)
        losses = [self._losses.get(step, math.nan) for step in range(first, last + 1)]
        width = min(self.console.width, 76)
        if drawn := loss_curve(losses, width, first=first, ascii_only=self._signs is _ASCII):
            curve = Text(drawn)
            curve.highlight_regex("[\u2801-\u28ff]+", "cyan")
            self._print(Text("\nLoss", style="bold"))
            self._print(curve, soft_wrap=True)

    def _held_out_summary(self) -> None:
        if not self._generations and not self._held_out:
            return
        trained = len(self._generations) > 1 and self._generations[0]["step"] == 0
        heading = f"\nHeld out, {self._change(['before', 'after training'])}" if trained else "\nHeld out"
        self._print(Text(heading, style="bold"))
        if self._generations:
            shares = self._change([f"{_number(event['exact_match']):.1%}" for event in self._generations])
            counts = self._change([f"{event['correct']:,}" for event in self._generations])
            self._named("exact match", Text(shares, style="bold"), f"  ({counts} of {self._generations[-1]['rows']:,})")
        if self._held_out:
            self._named("loss", self._change([f"{loss:.4f} at step {step:,}" for step, loss in self._held_out]))

    def _samples(self) -> None:
        if not self._generations:
            return
        first, last = self._generations[0], self._generations[-1]
        before = {(sample["prompt"], sample["expected"]): sample["got"] for sample in first["samples"]}
        shown = [s for s in last["samples"] if (s["prompt"], s["expected"]) in before][:_SAMPLES]
        for number, sample in enumerate(shown, start=1):
            self._print(Text(f"\nSample {number}", style="bold"))
            answers = [("before", before[sample["prompt"], sample["expected"]]), ("after", sample["got"])]
            if first is last:
                answers = [("answer", sample["got"])]
            self._field("prompt", sample["prompt"])
            self._field("expected", sample["expected"])
            for name, answer in answers:
                self._field(name, answer, answer.strip() == sample["expected"].strip())

    def _field(self, name: str, text: str, right: bool | None = None) -> None:
        """One field of a sample, wrapped beside its name."""
        sign, style = ("", "dim")
        if right is not None:
            sign, style = (self._signs.right, "green") if right else (self._signs.wrong, "red")
        lead = f"  {name:<8} {sign:<{len(self._signs.right)}} "
        room = max(20, self.console.width - len(lead))
        body = Text(self._plain(text.strip()) or "(nothing)", style="" if text.strip() else "dim")
        lines = list(body.wrap(self.console, room, overflow="fold"))
        if len(lines) > _SAMPLE_LINES:
            head, tail = _SAMPLE_LINES - 2, 1
            left_out = f"{self._signs.cut} {len(lines) - head - tail} more lines {self._signs.cut}"
            lines = [*lines[:head], Text(left_out, style="dim"), *lines[-tail:]]
        for line in lines:
            shown = Text.assemble((lead, style), line)
            shown.rstrip()
            self._print(shown, soft_wrap=True)
            lead = " " * len(lead)

    def _result(self, event: Event) -> None:
        stopped, step = event["stopped"], event["step"]
        if stopped is None:
            self._print(Text("\nDone", style="bold green"))
        elif stopped == "interrupted":
            self._print(Text(f"\nInterrupted after step {step:,} of {self._last_step:,}", style="bold yellow"))
        else:
            self._print(Text(f"\nStopped after step {step:,} of {self._last_step:,}", style="bold red"))
            self._print(Text(self._plain(f"  {stopped}"), style="red"), soft_wrap=True)
        self._named("time", f"{event['seconds']:,.1f} s")
        speed = peak = ""
        if planned := event.get("planned"):
            if took := planned["seconds"] * step:  # the same tokens in the planned time
                speed = f", {event['tokens'] / took:,.0f} planned"
            if planned["device_bytes"] is not None:
                peak = f", {planned['device_bytes'] / GIB:.2f} planned"
        self._named("speed", f"{event['tokens_per_second']:,.0f} tokens/s{speed} ({event['tokens']:,} tokens)")
        self._named("peak memory", f"{event['peak_memory_gib']:.2f} GiB ({event['memory_kind']}){peak}")
        self._named("adapter" if stopped is None else "output", str(event["output_dir"]))

    # How things are printed. Always as Text: a model's [brackets] are no markup.

    def _at(self, step: int) -> str:
        return f"step {step:>{len(str(self._last_step))}}"

    def _change(self, values: list[str]) -> str:
        return f" {self._signs.to} ".join(values)

    def _line(self, text: str, about: str = "") -> None:
        line = Text(self._plain(text))
        if about:
            line.append(f"  {about}", style="dim")
        self._print(line, soft_wrap=True)

    def _named(self, name: str, text: Text | str, about: str = "") -> None:
        shown = text if isinstance(text, Text) else Text(self._plain(text))
        self._print(Text.assemble((f"  {name:<11}  ", "dim"), shown, about), soft_wrap=True)

    def _print(self, text: Text, soft_wrap: bool = False) -> None:
        self.console.print(text, soft_wrap=soft_wrap, highlight=False)

    def _plain(self, text: str) -> str:
        return printable(text, self.console.encoding)


def _number(value: object) -> float:
    """As a log has it: what is not finite is text there. nan: it is no number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _is_sample(value: object) -> bool:
    match value:
        case {"prompt": str(), "expected": str(), "got": str()}:
            return True
    return False


class _Figures(ProgressColumn):
    """What stands beside the bar. The time left ticks between steps, which can take minutes."""

    def render(self, task: Task) -> Text:
        total = int(task.total or 0)
        text = Text(f"{int(task.completed):>{len(str(total))}}/{total}", no_wrap=True)
        step = task.fields["step"]
        if step is None:
            return text.append(f"  {_clock(task.elapsed or 0.0)}", style="dim")
        text.append("  loss ", style="dim").append(f"{step['loss']:.4f}")
        text.append(f"  {step['tokens_per_second']:,.0f}").append(" tokens/s", style="dim")
        text.append(f"  {step['memory_gib']:.2f}").append(" GiB", style="dim")
        left = max(0.0, task.fields["left"] - time.monotonic())
        return text.append(f"  {_clock(left)}").append(" left", style="dim")


def loss_curve(
    losses: Sequence[float], width: int = 64, height: int = 10, *, first: int = 1, ascii_only: bool = False
) -> str:
    """A curve to print.

    losses      one for each step; what is not finite is left out. A column that several steps share shows their mean
    width       columns, labels included
    height      lines of the curve itself, at least 3; two more hold the steps
    first       the first loss's step
    ascii_only  stars in place of braille dots

    Returns lines joined by newlines; "" where there is nothing to draw.
    """
    points = [(first + i, float(loss)) for i, loss in enumerate(losses) if math.isfinite(loss)]
    if not points:
        return ""
    height = max(3, height)
    intervals = max(2, round((height - 1) / 3))
    ticks = _loss_ticks(min(loss for _, loss in points), max(loss for _, loss in points), intervals)
    label_at = {round(i * (height - 1) / intervals): label for i, (label, _) in enumerate(reversed(ticks))}
    gutter = max(len("step"), *(len(label) for label, _ in ticks))
    columns = max(8, width - gutter - 2)
    last = first + len(losses) - 1

    def column(step: int, wide: int) -> int:
        return round((step - first) / max(1, last - first) * (wide - 1))

    low, high = ticks[0][1], ticks[-1][1]
    across, down = (1, 1) if ascii_only else (2, 4)
    shared: dict[int, list[float]] = {}
    for step, loss in points:
        shared.setdefault(column(step, columns * across), []).append(loss)
    rows = height * down
    dots = _line([(x, (high - sum(of) / len(of)) / (high - low) * (rows - 1)) for x, of in shared.items()])
    canvas = _stars(dots, columns, height) if ascii_only else _braille(dots, columns, height)

    tick, bar, corner, floor, mark = "+|+-+" if ascii_only else "┤│└─┬"
    lines = []
    for row, drawn in enumerate(canvas):
        label = label_at.get(row)
        lines.append(f"{label or '':>{gutter}} {bar if label is None else tick}{drawn}".rstrip())
    axis, labels = [floor] * columns, [" "] * columns
    for step in _step_ticks(first, last, columns):
        at, text = column(step, columns), str(step)
        start = min(max(0, at - len(text) // 2), columns - len(text))
        if start < 0 or any(char != " " for char in labels[max(0, start - 2) : start + len(text) + 2]):
            continue
        axis[at] = mark
        labels[start : start + len(text)] = text
    lines.append(f"{'':>{gutter}} {corner}{''.join(axis)}")
    lines.append(f"{'step':>{gutter}}  {''.join(labels)}".rstrip())
    return "\n".join(lines)


def _loss_ticks(low: float, high: float, intervals: int) -> list[tuple[str, float]]:
    """The tightest scale of that many round intervals that holds low and high: (label, value), rising."""
    if high - low <= max(1e-12, 1e-9 * abs(high)):  # nothing but rounding; a flat curve stands in the middle
        low, high = (low - abs(low) / 20, high + abs(high) / 20) if abs(low) > 1e-12 else (0.0, 1.0)
    for exponent in count(math.floor(math.log10((high - low) / intervals))):
        for digits in (10, 12, 15, 20, 25, 30, 40, 50, 60, 80):
            interval = digits * 10.0 ** (exponent - 1)
            lowest = math.floor(low / interval + 1e-9) * interval
            if lowest + intervals * interval >= high - 1e-9 * interval:
                decimals = max(0, -exponent + (digits % 10 > 0))
                values = [lowest + i * interval for i in range(intervals + 1)]
                form = f".{decimals}f" if exponent < 6 and decimals < 7 else ".3g"
                return [(f"{value:{form}}", value) for value in values]
    raise AssertionError("some interval is large enough")


def _step_ticks(first: int, last: int, columns: int) -> list[int]:
    """Steps to name below the curve, those that matter most first: both ends, then round ones."""
    apart = next(
        digit * 10**exponent
        for exponent in count()
        for digit in (1, 2, 5)
        if digit * 10**exponent >= (last - first) / max(1, columns // 10)
    )
    return [first, last, *range(-(-first // apart) * apart, last, apart)]


def _line(points: list[tuple[int, float]]) -> set[tuple[int, int]]:
    """The dots (column, row) of a line through the points."""
    dots = {(x, round(y)) for x, y in points}
    for (x0, y0), (x1, y1) in pairwise(points):
        before = round(y0)
        for x in range(x0 + 1, x1 + 1):
            here = round(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
            half = (before + here) // 2  # a steep piece climbs half in one column, half in the next
            dots |= {(x - 1, y) for y in range(min(before, half), max(before, half) + 1)}
            dots |= {(x, y) for y in (range(half + 1, here + 1) if here > half else range(here, half))} | {(x, here)}
            before = here
    return dots


def _braille(dots: set[tuple[int, int]], columns: int, height: int) -> list[str]:
    # Unicode numbers a cell's dots down the left column, down the right one, then the two at the bottom.
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    cells = [[0] * columns for _ in range(height)]
    for x, y in dots:
        cells[y // 4][x // 2] |= bits[y % 4][x % 2]
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in row) for row in cells]


def _stars(dots: set[tuple[int, int]], columns: int, height: int) -> list[str]:
    return ["".join("*" if (x, y) in dots else " " for x in range(columns)) for y in range(height)]


def printable(text: str, encoding: str) -> str:
    """Text from outside with control characters, and what cannot be encoded, as escapes: data must not steer."""
    shown = "".join(
        repr(char)[1:-1] if unicodedata.category(char) == "Cc" and char not in "\n\t" else char for char in text
    )
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _short(number: int) -> str:
    """134515008 as 134.5M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 10 * size else f"{number / size:,.1f}{unit}"
    return str(number)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if part < whole else "all"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
