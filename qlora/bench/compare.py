"""Whether a later run of a suite is worse than an earlier one: row by row, beyond a threshold and beyond the noise.

Two files were not measured in turn, so their steps have no partners and the machine may have drifted between them. The
ratio of two speeds is that of their medians, and its spread is the widest that 20th and 80th percentiles allow:
from new p20 / old p80 to new p80 / old p20. Only where all of that is on one side of 1 did a speed change; the rest is
noise. Memory is counted, not clocked, so there the threshold decides alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora.bench.results import Results, Row, Spread, is_noise, read
from qlora.bench.work import short

BROKEN = ("out of memory", "failed", "late")  # what must not become of a row that was ok
# Of the environment: what is compared, and what differs from run to run on one machine.
PASSING = ("command", "commit", "dirty", "load_average", "memory_gib", "device_gib")


def share(text: str) -> float:
    """`5%` and `0.05` are 0.05. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", text.strip())
    value = float(found[1]) / (100 if found[2] else 1) if found else 1.0
    if not value < 1:
        raise ValueError(f"`{text}` is not a share below 100%, as 5% or 0.05")
    return value


@dataclass(frozen=True, slots=True)
class Pair:
    """A row of both files. Ratios are new / old; None: one of the two does not have the figure.

    speed                   of tokens a second
    memory, reserved, host  of the peaks: allocated or live tensors; held by torch's allocator; resident on the host
    longest                 of the longest context that trains, where the rows are searches for it
    worse                   what got worse beyond the threshold and the noise
    better                  likewise
    """

    old: Row
    new: Row
    speed: Spread | None = None
    memory: float | None = None
    reserved: float | None = None
    host: float | None = None
    longest: float | None = None
    worse: tuple[str, ...] = ()
    better: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """For people."""
        if self.worse or self.better:
            return ", ".join((*self.worse, *self.better))
        if self.new.status != "ok":
            return self.new.status
        return "noise" if self.speed is not None and is_noise(self.speed) else "as before"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs.

    pairs               rows that are in both
    only_old, only_new  rows that are in one
    apart               in which the runs themselves differ, a line each: then ratios may say nothing of the program
    threshold           share beyond which a difference counts
    """

    pairs: list[Pair]
    only_old: list[Row]
    only_new: list[Row]
    apart: list[str]
    threshold: float

    @property
    def regressions(self) -> list[Pair]:
        """The pairs of which something got worse."""
        return [pair for pair in self.pairs if pair.worse]


def compare(old: Results, new: Results, threshold: float) -> Comparison:
    """Row by row. threshold: share beyond which a difference counts."""
    before, after = ({_key(row): row for row in results.rows} for results in (old, new))
    pairs = [_pair(row, after[key], threshold) for key, row in before.items() if key in after]
    return Comparison(
        pairs=pairs,
        only_old=[row for key, row in before.items() if key not in after],
        only_new=[row for key, row in after.items() if key not in before],
        apart=[*_surroundings(old, new), *_settings(pairs)],
        threshold=threshold,
    )


def compare_files(old: Path, new: Path, threshold: float, console: Console) -> int:
    """Print the comparison; exit status 1 with regressions, else 0. Raises DataError where a file is none of ours."""
    comparison = compare(read(old), read(new), threshold)
    if comparison.pairs:
        console.print(table(comparison))
    for line in lines(comparison):
        console.print(line, markup=False, highlight=False)
    return 1 if comparison.regressions else 0


def table(comparison: Comparison) -> Table:
    """A row for each pair; ratios are new / old."""
    shown = Table(title="new / old; of tokens/s: median, and from p20/p80 to p80/p20")
    for column in ("work", "method", "tokens/s", "memory", "reserved", "host", "verdict"):
        shown.add_column(column)
    for pair in comparison.pairs:
        speed = f"{pair.speed.median:.2f} {pair.speed.p20:.2f}-{pair.speed.p80:.2f}" if pair.speed else "-"
        ratios = ("-" if ratio is None else f"{ratio:.3f}" for ratio in (pair.memory, pair.reserved, pair.host))
        style = "red" if pair.worse else "green" if pair.better else ""
        shown.add_row(_work(pair.new), pair.new.name, speed, *ratios, pair.verdict, style=style)
    return shown


def lines(comparison: Comparison) -> Iterator[str]:
    """What the table does not say, and the sum of it."""
    for row in comparison.only_old:
        yield f"only in the old file: {row.name}, {_work(row)}"
    for row in comparison.only_new:
        yield f"only in the new file: {row.name}, {_work(row)}"
    for line in comparison.apart:
        yield f"the runs are not alike: {line}"
    if not comparison.pairs:
        yield "no row is in both files"
        return
    for pair in comparison.regressions:
        error = f": {pair.new.error}" if pair.new.error else ""
        yield f"REGRESSION  {pair.new.name}, {_work(pair.new)}: {', '.join(pair.worse)}{error}"
    yield (
        f"{len(comparison.regressions)} of {len(comparison.pairs)} rows are worse by more than "
        f"{comparison.threshold:.3g} of what they were"
    )


def _key(row: Row) -> tuple[Any, ...]:
    """What a row is of. The tokens of a search are its result, so they are no part of it."""
    return row.name, row.model, row.r, row.vram, row.k, row.rows, None if row.trials else row.tokens


def _pair(old: Row, new: Row, threshold: float) -> Pair:
    if old.status != "ok" or new.status != "ok":
        broke, mended = old.status == "ok" and new.status in BROKEN, new.status == "ok" and old.status in BROKEN
        return Pair(
            old,
            new,
            worse=(f"was ok, is {new.status}",) if broke else (),
            better=(f"was {old.status}, is ok",) if mended else (),
        )
    worse: list[str] = []
    better: list[str] = []

    def weigh(ratio: float | None, up: str, down: str, more_is_worse: bool = True) -> float | None:
        """up, down: how a ratio above, below 1 is called"""
        if ratio is not None and abs(ratio - 1) > threshold:
            said = f"{up if ratio > 1 else down} ({ratio:.3g}x)"
            (worse if (ratio > 1) == more_is_worse else better).append(said)
        return ratio

    if old.trials:
        return Pair(
            old,
            new,
            longest=weigh(new.tokens / old.tokens, "longer context", "shorter context", False),
            worse=tuple(worse),
            better=tuple(better),
        )
    before, after, speed = old.tokens_per_second, new.tokens_per_second, None
    if before is not None and after is not None:
        speed = Spread(median=after.median / before.median, p20=after.p20 / before.p80, p80=after.p80 / before.p20)
        if not is_noise(speed):
            weigh(speed.median, "faster", "slower", False)
    was, now = old.peaks, new.peaks
    return Pair(
        old,
        new,
        speed,
        memory=weigh(_ratio(old.memory_gib, new.memory_gib), "more memory", "less memory"),
        reserved=weigh(_ratio(was and was.reserved, now and now.reserved), "more reserved", "less reserved"),
        host=weigh(_ratio(was and was.host, now and now.host), "more on the host", "less on the host"),
        worse=tuple(worse),
        better=tuple(better),
    )


def _ratio(old: float | None, new: float | None) -> float | None:
    return new / old if old and new else None


def _surroundings(old: Results, new: Results) -> Iterator[str]:
    """Where the runs' machines and programs differ, but for the commit, which is what is compared."""
    if (old.device, old.device_name) != (new.device, new.device_name):
        yield f"{old.device_name} then, {new.device_name} now: their ratios compare machines"
    was, now = (_flat(results.environment) for results in (old, new))
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            yield f"{name} {was.get(name)} then, {now.get(name)} now"
    for results, which in ((old, "old"), (new, "new")):
        if not results.complete:
            yield f"the {which} run was interrupted"


def _flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    versions = environment.get("versions", {})
    return {name: value for name, value in environment.items() if name not in (*PASSING, "versions")} | versions


def _settings(pairs: list[Pair]) -> Iterator[str]:
    for pair in pairs:
        for name in ("method", "optim", "memory"):
            was, now = getattr(pair.old, name), getattr(pair.new, name)
            if was != now:
                yield f"{pair.new.name}, {_work(pair.new)}: {name} {was} then, {now} now"


def _work(row: Row) -> str:
    cap = f" in {row.vram:g} GiB" if row.vram is not None else ""
    work = f"longest of {row.k}" if row.trials else row.work
    return f"{short(row.model)} r={row.r}{cap}, {work}"
