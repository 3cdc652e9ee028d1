"""Bars, legends and rows of a screen, as text that needs neither color nor more than 100 columns to be read."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from string import ascii_lowercase
from textwrap import wrap
from typing import Any, NamedTuple

from rich.text import Text

from qlora.machine import GIB

LABEL = 11  # columns before each line, where its label stands
COLORS = ("blue", "cyan", "green", "yellow", "magenta", "red")


class Signs(NamedTuple):
    """What a bar is drawn with: fills that take turns, what is free, what others have, parts of a cell, a mark of
    what was cut off."""

    fills: str
    free: str
    taken: str
    parts: str
    cut: str


UNICODE = Signs("█▓▒", "·", "░", "▏▎▍▌▋▊▉█", "…")
ASCII = Signs("#=%", ".", "x", "#", "...")


def apportion(values: Sequence[float], whole: int, least: int = 0) -> list[int]:
    """Integers in proportion to the values, whose sum is `whole`: rounded figures that still add up.

    least  for each value above 0, as far as `whole` has room for it
    """
    kept = {i for i, value in enumerate(values) if value > 0}
    parts = [0] * len(values)
    while kept:
        room = whole - sum(parts)
        total = sum(values[i] for i in kept)
        small = {i for i in kept if values[i] * room < least * total}
        if not small or room < least * len(kept):
            exact = {i: values[i] * room / total for i in kept}
            for i in kept:
                parts[i] = int(exact[i])
            left = whole - sum(parts)
            for i in sorted(kept, key=lambda i: (int(exact[i]) - exact[i], i))[:left]:
                parts[i] += 1
            break
        for i in small:
            parts[i] = least
        kept -= small
    return parts


class Segment(NamedTuple):
    """One part of a bar.

    gib   as its legend says it
    fill  what it is drawn with; "": one of the fills that take turns, and a letter below
    """

    name: str
    nbytes: int
    gib: str
    fill: str = ""


def segmented(segments: Sequence[Segment], width: int, signs: Signs) -> list[Text]:
    """A bar of `width` cells, letters below it, and the legend. What has no bytes is left out."""
    segments = [segment for segment in segments if segment.nbytes > 0]
    cells = apportion([segment.nbytes for segment in segments], width, least=1)
    bar, letters, legend = Text(), Text(), []
    for i, (segment, wide) in enumerate(zip(segments, cells, strict=True)):
        sign, style = segment.fill, "dim"
        if not segment.fill:
            sign, style = ascii_lowercase[i % 26], COLORS[i % len(COLORS)]
        bar.append((segment.fill or signs.fills[i % len(signs.fills)]) * wide, style)
        letters.append(f"{'' if segment.fill else sign:<{wide}}", style)
        legend.append((sign, style, segment.name, segment.gib))
    return [bar, letters, *_legend(legend, width)]


def _legend(items: Sequence[tuple[str, str, str, str]], width: int) -> list[Text]:
    """In three columns or two, where they fit, else one item after the other."""
    for many in (3, 2):
        rows = -(-len(items) // many)
        columns = [items[i : i + rows] for i in range(0, len(items), rows)]
        wide = [(max(len(name) for _, _, name, _ in c), max(len(gib) for *_, gib in c)) for c in columns]
        if sum(name + gib + 3 for name, gib in wide) + 3 * (len(columns) - 1) > width:
            continue
        lines = [Text() for _ in range(rows)]
        for column, (name_wide, gib_wide) in zip(columns, wide, strict=True):
            for line, (sign, style, name, gib) in zip(lines, column, strict=False):
                line.append("   " if line else "")
                line.append(sign, style).append(f" {name:<{name_wide}} {gib:>{gib_wide}}")
        return lines
    return flow([Text.assemble((sign, style), f" {name} ", gib) for sign, style, name, gib in items], width, "  ")


def filled(share: float, width: int, signs: Signs, style: str = "") -> Text:
    """A bar of one kind, to a part of a cell, in `width` cells."""
    parts = round(min(1.0, max(0.0, share)) * width * len(signs.parts))
    whole, part = divmod(parts, len(signs.parts))
    return Text(signs.parts[-1] * whole + (signs.parts[part - 1] if part else ""), style)


def flow(pieces: Sequence[Text | str], width: int, between: str) -> list[Text]:
    """Pieces one after the other in lines of `width` columns, broken between them, and inside one that is longer."""
    lines = [Text()]
    for piece in pieces:
        text = Text(piece) if isinstance(piece, str) else piece
        # What separates two pieces stays with the first, so it needs room there.
        whole = [text] if len(text) < width else [Text(line) for line in wrap(text.plain, width - 1)]
        for i, part in enumerate(whole):
            if lines[-1] and (i or len(lines[-1]) + len(between) + len(part) >= width):
                lines[-1].append("" if i else between.rstrip())
                lines.append(Text())
            lines[-1].append(between if lines[-1] else "").append_text(part)
    return lines


def one_line(pieces: Sequence[str], width: int, signs: Signs) -> str:
    """As many pieces as there is room for, with commas, and a mark where some are missing."""
    for many in range(len(pieces), 0, -1):
        text = ", ".join(pieces[:many]) + f", {signs.cut}" * (many < len(pieces))
        if len(text) <= width:
            return text
    return "".join(pieces[:1])[: width - len(signs.cut)] + signs.cut


def labelled(label: str, lines: Sequence[Text]) -> list[Text]:
    """The lines with a label before the first of them, and nothing behind them."""
    out = []
    for i, line in enumerate(lines):
        whole = Text.assemble((f"{label if i == 0 else '':<{LABEL}}", "bold"), line)
        whole.rstrip()
        out.append(whole)
    return out


def plain(text: str, ascii_only: bool) -> str:
    """Text from outside on one line, its control characters, and what ASCII lacks if need be, as escapes."""
    shown = "".join(repr(char)[1:-1] if unicodedata.category(char) in ("Cc", "Cs") else char for char in text)
    return shown.encode("ascii", "backslashreplace").decode() if ascii_only else shown


def hundredths(nbytes: float) -> int:
    """Of a GiB."""
    return round(nbytes / GIB * 100)


def gib(nbytes: float, decimals: int = 2) -> str:
    """Bytes as GiB, without the unit."""
    return f"{nbytes / GIB:,.{decimals}f}"


def signed_gib(nbytes: int) -> str:
    """The same with its sign; a dash for next to nothing."""
    return f"{nbytes / GIB:+,.2f}" if hundredths(nbytes) else "-"


def figures(sizes: Sequence[int]) -> list[str]:
    """Bytes as GiB that add up to what their sum is shown as."""
    return [f"{each / 100:.2f}" for each in apportion(sizes, hundredths(sum(sizes)))]


def count(number: int) -> str:
    """41943040 as 41.9M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 100 * size else f"{number / size:,.0f}{unit}"
    return str(number)


def duration(seconds: float) -> str:
    """To three digits, in the unit that people would take."""
    if not math.isfinite(seconds):
        return "forever"
    if seconds < 600:
        return f"{seconds:.{2 if seconds < 10 else 1 if seconds < 100 else 0}f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def as_recipe(value: Any) -> str:
    """A value as one would write it in a recipe. JSON is YAML, and plain words need no quotes."""
    word = isinstance(value, str) and re.fullmatch(r"[A-Za-z./~][\w./~-]*", value)
    if word and value.lower() not in ("null", "true", "false", "yes", "no", "on", "off", "~"):
        return value
    return json.dumps(value, ensure_ascii=False)
