"""Result files as tables: for a terminal, in Markdown, and small enough for a README.

What a table says is decided once, as grids of plain text; each rendering below only writes them down. The page has its
own (`page.py`).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora.bench.results import Agreement, Peaks, Results, Row, is_noise, ratio, spread
from qlora.bench.work import short
from qlora.errors import DataError

STOCK = "hf-qlora"  # what a README compares with
_ERROR = 90  # characters of an error that a cell has room for
_ITSELF = "1x"  # a row compared with itself


@dataclass(frozen=True, slots=True)
class Line:
    """A row, and the row that it is compared with: another method's doing the same work, its own, or None."""

    row: Row
    other: Row | None


@dataclass(frozen=True, slots=True)
class Column:
    """A column's head, and what it says of a line; "" where it has nothing to say. key: it tells rows apart."""

    head: str
    cell: Callable[[Line], str]
    key: bool = False


@dataclass(frozen=True, slots=True)
class GridRow:
    """Cells of a row. starts: it is the first of those compared with one another. ok: the method did its work."""

    cells: list[str]
    starts: bool
    ok: bool


@dataclass(frozen=True, slots=True)
class Grid:
    """A table before it is rendered: plain text, as many cells in each row as there are heads; the first `keys` of
    them are words, the others figures."""

    title: str
    heads: list[str]
    keys: int
    rows: list[GridRow]


@dataclass(frozen=True, slots=True)
class Note:
    """A line below a table. alarming: nobody should read the table without it."""

    text: str
    alarming: bool = False


# --- what there is to say ---------------------------------------------------------------------------------------------


def lines(results: Results, against: str | None = None) -> list[list[Line]]:
    """The rows, those together that are compared with one another, in the order of the file.

    against  the name of the rows that the others are compared with; None: the suite's first method
    """
    against = against or first_method(results)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.rows:
        # What a search found is a result, not what its rows share.
        groups.setdefault(row.group[:-1] if searched(results) else row.group, []).append(row)
    return [
        [Line(row, next((other for other in group if other.name == against), None)) for row in group]
        for group in groups.values()
    ]


def first_method(results: Results) -> str:
    """The name of the method that the others are compared with; of a file that does not say, its first row's."""
    for each in results.settings.get("methods") or []:
        return str(each.get("name") or each.get("method")) if isinstance(each, dict) else str(each)
    return results.rows[0].name if results.rows else ""


def searched(results: Results) -> bool:
    """Whether the file holds searches for the longest context."""
    return results.settings.get("search") == "context" or any(row.trials for row in results.rows)


def status(row: Row) -> str:
    """What became of a row that is not ok: `out of memory`, `failed: ValueError: no such thing`."""
    if row.status not in ("failed", "late", "not tried") or not row.error:
        return row.status
    first = row.error.strip().partition("\n")[0]
    return f"{row.status}: {first[:_ERROR] + '...' if len(first) > _ERROR else first}"


def grids(results: Results) -> list[Grid]:
    """What a file says: the comparison, where the time went, and what had been planned. Columns that have nothing to
    say are left out, and so is a table that has no others."""
    groups = lines(results)
    keys = [*_varying(results), Column("method", lambda line: line.row.name, key=True)]
    first = first_method(results)
    per_context = searched(results)
    sections = {
        "": [
            *([Column("longest context", _context)] if per_context else []),
            Column("tokens/s", _speed),
            # Speeds at unlike lengths are facts, their ratio is not a comparison.
            Column(f"context, {first} / this", lambda line: _times(_context_ratio(line.other, line.row), line))
            if per_context
            else Column(f"tokens/s, {first} / this", lambda line: _speed_ratio(line.other, line.row, line)),
            Column("VRAM, GiB", lambda line: _gib(_peak(line, "allocated"))),
            Column("reserved, GiB", lambda line: _gib(_peak(line, "reserved"))),
            Column("live tensors, GiB", _tensors),
            Column(f"memory, {first} / this", lambda line: _times(_memory_ratio(line.other, line.row), line)),
            Column("RSS, GiB", lambda line: _gib(_peak(line, "host"))),
            Column("first loss", lambda line: f"{line.row.losses[0]:.4f}" if line.row.losses else ""),
        ],
        "Where the time goes": [
            Column("s a step", lambda line: _seconds(_step_seconds(line.row))),
            Column("compute / weights / data / optimizer, %", _shares),
            Column("HFU", lambda line: _utilization(line.row, line.row.flops, results.ceiling)),
            Column("MFU", lambda line: _utilization(line.row, line.row.model_flops, results.ceiling)),
            Column("J/token", _joules),
            Column("load, s", lambda line: _seconds(line.row.loaded and line.row.loaded.seconds)),
            Column("load peak, VRAM GiB", lambda line: _gib(line.row.loaded and line.row.loaded.device_peak_gib)),
            Column("load peak, host GiB", lambda line: _gib(line.row.loaded and line.row.loaded.host_peak_gib)),
        ],
        "Planned / measured": [
            Column("memory, GiB", lambda line: _planned(line.row, "allocated", line.row.memory_gib)),
            Column("reserved, GiB", lambda line: _planned(line.row, "reserved", _peak(line, "reserved"))),
            Column("s a step", lambda line: _planned(line.row, "seconds", _step_seconds(line.row))),
        ],
    }
    made = [_grid(title, keys, columns, groups) for title, columns in sections.items()]
    return [grid for grid in made if grid.rows]


def notes(results: Results) -> list[Note]:
    """What must be known to read the tables of a file: what all rows share, whether the losses agree, how it was
    measured."""
    said = []
    if not results.complete:
        said.append(Note("The run was interrupted: this is what it had measured.", alarming=True))
    if not results.rows:
        said.append(Note("Nothing was measured."))
    shared = [value for _, values in _key_values(results) if len(values) == 1 for value in values if value]
    if shared:
        said.append(Note(f"All rows: {', '.join(shared)}."))
    for name, memory in {row.name: row.memory for row in results.rows if row.memory}.items():
        said.append(Note(f"{name}: memory: {', '.join(f'{key}={value}' for key, value in memory.items())}."))
    said += _agreements(results)
    if results.settings.get("search") == "model":
        said += _largest(results)
    if taken := [row for row in results.rows if row.steps]:
        timed, warm_up = {len(row.steps) for row in taken}, {len(row.warm_up) for row in taken}
        order = "the methods in turn" if results.in_turn else "one method after the other"
        said.append(
            Note(
                f"{_range(timed)} timed {'step' if timed == {1} else 'steps'} after {_range(warm_up)} to warm up, "
                f"{order}: median (20th to 80th percentile). noise: the difference is smaller than its spread."
            )
        )
    if results.ceiling and any(row.flops for row in results.rows):
        said.append(
            Note(
                "HFU and MFU: operations a second, with and without what was computed twice, of the "
                f"{results.ceiling / 1e12:,.3g} TFLOP/s of this machine's own bf16 matrix products."
            )
        )
    if any(row.peaks and not row.peaks.host_told_apart for row in results.rows):
        said.append(Note("This system cannot reset the high-water mark: RSS contains the load's peak."))
    return said


def byline(results: Results) -> str:
    """Where, when and of what: `NVIDIA H100 · 2026-11-22 · commit 1234567890ab`."""
    commit = str(results.environment.get("commit") or "")[:12]
    changed = " with changes" if results.environment.get("dirty") else ""
    return " · ".join([results.device_name, results.date[:10], *([f"commit {commit}{changed}"] if commit else [])])


def command(results: Results) -> str:
    """The line that made the file; "" where it does not say."""
    said = results.environment.get("command") or ""
    return said if isinstance(said, str) else " ".join(str(word) for word in said)


# --- renderings -------------------------------------------------------------------------------------------------------


def markdown(results: Sequence[Results]) -> str:
    """A section for each file: heading, tables, and what must be known to read them."""
    parts = []
    for each in results:
        parts += [f"## {mark(each.title)}", mark(byline(each))]
        for grid in grids(each):
            parts += [*([f"### {grid.title}"] if grid.title else []), _markdown_table(grid)]
        if below := notes(each):
            text = [mark(note.text) for note in below]
            parts.append("\n".join(f"- **{t}**" if n.alarming else f"- {t}" for n, t in zip(below, text, strict=True)))
        if command(each):
            parts.append(f"    {' '.join(command(each).split())}")
    return "\n\n".join(parts) + "\n"


def terminal(results: Results) -> RenderableType:
    """The same for the end of a run."""
    parts: list[RenderableType] = []
    for grid in grids(results):
        title = Text(grid.title or f"{results.title} · {byline(results)}", style="bold")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for n, head in enumerate(grid.heads):
            table.add_column(Text(head), justify="left" if n < grid.keys else "right", overflow="fold")
        for n, row in enumerate(grid.rows):
            last = n + 1 == len(grid.rows) or grid.rows[n + 1].starts
            # Shorter, and it does not break within the spread.
            cells = [Text(cell.replace(" to ", "-")) for cell in row.cells]
            table.add_row(*cells, end_section=last, style="" if row.ok else "yellow")
        parts.append(table)
    parts += [Text(note.text, style="bold red" if note.alarming else "") for note in notes(results)]
    return Group(*parts)


def compact(
    results: Results,
    columns: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    against: str | None = None,
) -> str:
    """A table for a README, in Markdown.

    columns  which and in what order, of those that `COMPACT` names, but what tells rows apart comes first; None: all.
             Those that have nothing to say are left out
    methods  names of the rows; None: all
    against  the name of the rows that the others are compared with; None: `hf-qlora`, where there is one

    Raises DataError where there is no such column or method.
    """
    reference = against or STOCK
    known = {
        "model": Column("model", lambda line: short(line.row.model), key=True),
        "vram": Column("of a GPU", lambda line: _cap(line.row), key=True),
        "r": Column("r", lambda line: str(line.row.r), key=True),
        "step": Column("tokens a step", lambda line: _step(line.row, searched(results)), key=True),
        "method": Column("method", lambda line: line.row.name, key=True),
        "context": Column("longest context", _context if searched(results) else lambda line: ""),
        "speed": Column("tokens/s", _speed),
        "against": Column(
            f"of {reference}",
            (lambda line: _times(_context_ratio(line.row, line.other), line))
            if searched(results)
            else (lambda line: _speed_ratio(line.row, line.other, line)),
        ),
        "allocated": Column("VRAM, GiB", lambda line: _gib(_peak(line, "allocated"))),
        "reserved": Column("reserved, GiB", lambda line: _gib(_peak(line, "reserved"))),
        "tensors": Column("peak tensor memory, GiB", _tensors),
        "memory": Column(f"of {reference}", lambda line: _times(_memory_ratio(line.row, line.other), line)),
        "rss": Column("RSS, GiB", lambda line: _gib(_peak(line, "host"))),
    }
    assert tuple(known) == COMPACT
    names = {row.name for row in results.rows}
    named = [*(methods or []), *([against] if against else [])]
    for word, given, there in (("column", columns or [], known), ("method", named, names)):
        if unknown := [each for each in given if each not in there]:
            raise DataError(f"there is no {word} `{unknown[0]}`; there are {', '.join(there)}")
    groups = [
        [line for line in group if not methods or line.row.name in methods] for group in lines(results, reference)
    ]
    varying = {column.head for column in _varying(results)}
    chosen = [
        known[name]
        for name in columns or COMPACT
        if columns or name not in ("model", "vram", "r") or known[name].head in varying
    ]
    keys, figures = [c for c in chosen if c.key], [c for c in chosen if not c.key]
    return _markdown_table(_grid("", keys, figures, [group for group in groups if group]))


COMPACT = (
    *("model", "vram", "r", "step", "method", "context", "speed", "against"),
    *("allocated", "reserved", "tensors", "memory", "rss"),
)


def _markdown_table(grid: Grid) -> str:
    written = [[mark(cell) for cell in cells] for cells in (grid.heads, *(row.cells for row in grid.rows))]
    rule = [":---" if n < grid.keys else "---:" for n in range(len(grid.heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (written[0], rule, *written[1:]))


def mark(text: str) -> str:
    """Text as Markdown that shows just that; backticks stay, they can do no harm."""
    return re.sub(r"([\\*\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", escape(" ".join(text.split()), quote=False))


# --- grids ------------------------------------------------------------------------------------------------------------


def _grid(title: str, keys: list[Column], columns: list[Column], groups: Iterable[list[Line]]) -> Grid:
    """Cells of all lines, without the columns that are empty in all of them. A key is said once in a group. Rows
    that have no figures are named in the first table, which has no title, and not once more in those below it."""
    groups = list(groups)
    full = [c for c in columns if any(c.cell(line) not in ("", _ITSELF) for group in groups for line in group)]
    rows: list[GridRow] = []
    for group in groups:
        before: list[str] | None = None
        for line in group:
            words, figures = [column.cell(line) for column in keys], [column.cell(line) for column in full]
            if title and not any(figures):
                continue
            shown = [
                "" if before and word == before[n] and keys[n].head != "method" else word
                for n, word in enumerate(words)
            ]
            rows.append(GridRow([*shown, *figures], before is None, line.row.status == "ok"))
            before = words
    return Grid(title, [column.head for column in (*keys, *full)], len(keys), rows)


def _key_values(results: Results) -> list[tuple[Column, list[str]]]:
    """What tells groups of rows apart, with what it can be, in the order of the file and as said below the table."""
    context = searched(results)
    keys = [
        (Column("model", lambda line: short(line.row.model), key=True), lambda row: short(row.model)),
        (Column("of a GPU", lambda line: _cap(line.row), key=True), lambda row: _cap(row)),
        (Column("r", lambda line: str(line.row.r), key=True), lambda row: f"r={row.r}"),
        (Column("tokens a step", lambda line: _step(line.row, context), key=True), lambda row: _step(row, context)),
        (Column("optimizer", lambda line: line.row.optim, key=True), lambda row: row.optim),
    ]
    return [(column, list(dict.fromkeys(map(say, results.rows)))) for column, say in keys]


def _varying(results: Results) -> list[Column]:
    """The key columns that differ between rows; what all share is said below the table."""
    return [column for column, values in _key_values(results) if len(values) > 1]


def _cap(row: Row) -> str:
    return "" if row.vram is None else f"{row.vram:g} GiB"


def _step(row: Row, context: bool) -> str:
    """Of a search for the longest context, all but the context."""
    return row.work.rpartition(" x ")[0] + " x its context" if context else row.work


# --- cells ------------------------------------------------------------------------------------------------------------


def _speed(line: Line) -> str:
    """Tokens a second; of a row that did not do all its work, what became of it."""
    found = line.row.tokens_per_second
    said = str(found or "").partition(" (")[0] if len(line.row.steps) == 1 else str(found or "")
    return "; ".join(part for part in (said, "" if line.row.status == "ok" else status(line.row)) if part)


def _speed_ratio(row: Row | None, of: Row | None, line: Line) -> str:
    times = ratio(row, of) if row and of else None
    if times is None or line.other is line.row or times.p20 == times.p80:
        return _times(times and times.median, line)
    return f"{times.median:.2f}x ({times.p20:.2f} to {times.p80:.2f}){', noise' if is_noise(times) else ''}"


def _times(times: float | None, line: Line) -> str:
    return "" if times is None else _ITSELF if line.other is line.row else f"{times:.2f}x"


def _context(line: Line) -> str:
    return f"{line.row.tokens:,}" if line.row.status == "ok" else ""


def _context_ratio(row: Row | None, of: Row | None) -> float | None:
    return row.tokens / of.tokens if row and of and row.status == of.status == "ok" else None


def _memory_ratio(row: Row | None, of: Row | None) -> float | None:
    """None unless both were counted the same way."""
    if row is None or of is None or not row.peaks or not of.peaks or not row.memory_gib or not of.memory_gib:
        return None
    return row.memory_gib / of.memory_gib if (row.peaks.allocated is None) == (of.peaks.allocated is None) else None


def _peak(line: Line, name: str) -> float | None:
    return None if line.row.peaks is None else getattr(line.row.peaks, name)


def _tensors(line: Line) -> str:
    peaks: Peaks | None = line.row.peaks
    return _gib(peaks.tensors) if peaks and peaks.allocated is None else ""  # on a GPU, `allocated` says it


def _gib(gib: float | None) -> str:
    return "" if gib is None else f"{gib:.3f}" if gib < 0.1 else f"{gib:.2f}" if gib < 100 else f"{gib:.1f}"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:,.0f}" if seconds >= 99.95 else f"{seconds:#.3g}"


def _step_seconds(row: Row) -> float | None:
    return statistics.median(step.seconds for step in row.steps) if row.steps else None


def _shares(line: Line) -> str:
    steps = line.row.steps
    total = sum(step.seconds for step in steps)
    parts = [sum(getattr(step, part) for step in steps) for part in ("compute", "weights", "data", "optimizer")]
    return " / ".join(f"{100 * part / total:.0f}" for part in parts) if total and any(parts) else ""


def _utilization(row: Row, flops: float | None, ceiling: float | None) -> str:
    seconds = _step_seconds(row)
    return f"{flops / seconds / ceiling:.0%}" if flops and seconds and ceiling else ""


def _joules(line: Line) -> str:
    said = spread([step.joules / line.row.tokens_per_step for step in line.row.steps if step.joules is not None])
    return "" if said is None else f"{said.median:#.3g}"


def _planned(row: Row, name: str, measured: float | None) -> str:
    """`12.10 / 12.30 (-2%)`: planned, measured, how far the plan is off."""
    if row.predicted is None or not measured:
        return ""
    planned = getattr(row.predicted, name)
    show = _seconds if name == "seconds" else _gib
    return f"{show(planned)} / {show(measured)} ({planned / measured - 1:+.0%})"


# --- notes ------------------------------------------------------------------------------------------------------------


def _range(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _agreements(results: Results) -> list[Note]:
    """A line for each disagreement; what agrees is put together over the works of a model and its methods."""
    together: dict[tuple[Any, ...], list[Agreement]] = {}
    for n, each in enumerate(results.agreements):
        alike = each.model, each.r, each.vram, each.base, *each.methods
        together.setdefault(alike if each.agree else (n,), []).append(each)
    models, ranks, caps = ({getattr(row, name) for row in results.rows} for name in ("model", "r", "vram"))
    said = []
    for same in together.values():
        one = same[0]
        where = [
            *([short(one.model)] if len(models) > 1 else []),
            *([f"r={one.r}"] if len(ranks) > 1 else []),
            *([f"{one.vram:g} GiB"] if len(caps) > 1 and one.vram is not None else []),
            *(each.work for each in same),
        ]
        first, later = max(each.first for each in same), max(each.later for each in same)
        verdict = "the same losses" if one.agree else "THE LOSSES DO NOT AGREE, this compares unlike work"
        said.append(
            Note(
                f"{', '.join(one.methods)} on a {one.base} base: {verdict} at {', '.join(where)}: "
                f"at most {first:.1g} apart before the first update, {later:.1g} after it.",
                alarming=not one.agree,
            )
        )
    return sorted(said, key=lambda note: not note.alarming)


def _largest(results: Results) -> list[Note]:
    """Of a search for the largest model, whose rows come smallest first."""
    largest: dict[tuple[str, float | None], str] = {}
    for row in results.rows:
        if row.status == "ok":
            largest[row.name, row.vram] = short(row.model)
    said = [f"{name}{f' in {vram:g} GiB' if vram is not None else ''} {m}" for (name, vram), m in largest.items()]
    return [Note(f"The largest that trains: {', '.join(said)}.")] if said else []
