"""Result files as plots: SVG to stand inside a page, in that page's colours, whether it is light or dark.

A plot with too few points to say anything is not drawn. A method has one colour and one marker in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from qlora.bench.results import Results, Row
from qlora.bench.tables import searched
from qlora.bench.work import short
from qlora.errors import MachineError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which the colour-blind tell apart: ours in blues and green, the stock stack in reds.
_METHODS = {
    "qlora": "#0072b2",
    "lora": "#56b4e9",
    "full": "#009e73",
    "hf-qlora": "#d55e00",
    "hf-lora": "#e69f00",
    "unsloth": "#cc79a7",
    "torchtune": "#8a8a8a",
    "llama-factory": "#b3a125",
}
_OTHERS = ("#7b6fd0", "#a6761d", "#4d9221", "#c51b7d", "#5f9ea0")
_MARKERS = "osD^vPX*<>hd"
# Of what memory is for: none of the methods' colours.
_CATEGORIES = ("#88ccee", "#cc6677", "#ddcc77", "#44aa99", "#aa4499", "#999933", "#6699cc", "#994455", "#ee8866")
_UNDIVIDED = "#9a9a9a"
_INK, _FAINT = "#010203", "#040506"  # stand for the page's colours, which are not known here
_WIDTH = 7.2  # inches of a plot; the page scales it
_LOSS_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing. title: what it shows, plain text. svg: one element, ready to stand in HTML."""

    title: str
    svg: str


@dataclass(frozen=True, slots=True)
class Look:
    """How a method is drawn."""

    colour: str
    marker: str


def looks(results: Iterable[Results]) -> dict[str, Look]:
    """A look for each name of a row, the same in all plots of a page."""
    names = list(dict.fromkeys(row.name for each in results for row in each.rows))
    spare = [*_OTHERS, *(colour for name, colour in _METHODS.items() if name not in names)]
    strange = [name for name in names if name not in _METHODS]
    colours = _METHODS | {name: spare[n % len(spare)] for n, name in enumerate(strange)}
    return {name: Look(colours[name], _MARKERS[n % len(_MARKERS)]) for n, name in enumerate(names)}


def plots(results: Results, look: dict[str, Look]) -> list[Plot]:
    """All plots that a file has enough points for. Raises MachineError without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise MachineError("a page needs matplotlib for its plots: pip install 'qlora-trainer[plots]'") from None
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "qlora",  # or ids would differ from run to run
        "text.parse_math": False,  # a name may hold dollars
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "grid.linewidth": 0.6,
        "grid.color": _FAINT,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INK),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), _FAINT),
    }
    with matplotlib.rc_context(style):
        drawn = [
            *_each(results, "Peak memory", lambda row: (row.model, row.r, row.vram), _memory, look),
            *_lengths(results, look),
            *_each(results, "Longest context", lambda row: (row.model, row.r, row.k, row.rows), _caps, look),
            *_losses(results, look),
            *_planned(results, look),
        ]
    return drawn


# --- the kinds --------------------------------------------------------------------------------------------------------


def _each(
    results: Results,
    title: str,
    share: Callable[[Row], tuple[Any, ...]],
    draw: Callable[[Results, list[Row], dict[str, Look]], str | None],
    look: dict[str, Look],
) -> list[Plot]:
    """One plot for the rows that share something, titled by the model and what else tells it from the others."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.rows:
        groups.setdefault(share(row), []).append(row)
    said = [(_place(rows, results.rows), draw(results, rows, look)) for rows in groups.values()]
    return [Plot(f"{title}: {place}", svg) for place, svg in said if svg]


def _memory(results: Results, rows: list[Row], look: dict[str, Look]) -> str | None:
    """A bar for each method and work, stacked by category where it is known."""
    rows = [row for row in rows if row.memory_gib]
    if len(rows) < 2 or searched(results):  # what a search found is always as much as there is
        return None
    categories = list(dict.fromkeys(name for row in rows if row.peaks for name in row.peaks.by_category))
    colours = {name: _CATEGORIES[n % len(_CATEGORIES)] for n, name in enumerate(categories)}
    figure = _figure(0.9 + 0.3 * len(rows) + 0.25 * len({row.work for row in rows}))
    axes = figure.subplots()
    ticks, labels, y, before, undivided = [], [], 0.0, rows[0].work, False
    for row in rows:
        y += 0.6 if row.work != before else 0.0  # works stand apart
        before = row.work
        total, left = row.memory_gib or 0.0, 0.0
        for name, gib in (row.peaks.by_category if row.peaks else {}).items():
            axes.barh(y, gib, left=left, height=0.78, color=colours[name])
            left += gib
        if total > left * 1.001:  # of others, and what no category claims
            axes.barh(y, total - left, left=left, height=0.78, color=_UNDIVIDED)
            undivided = True
        end = max(total, left), y
        axes.annotate(f"{total:.2f}", end, xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        ticks.append(y)
        labels.append(f"{row.work} · {row.name}")
        y += 1.0
    axes.set_yticks(ticks, labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.1)
    counted = "VRAM allocated" if rows[0].peaks and rows[0].peaks.allocated else "live tensors"
    axes.set_xlabel(f"GiB of {counted} at the peak")
    patches = [(_patch(colour), name) for name, colour in colours.items()]
    patches += [(_patch(_UNDIVIDED), "not told apart")] if undivided and categories else []
    return _svg(_legend(figure, patches))


def _lengths(results: Results, look: dict[str, Look]) -> list[Plot]:
    """Tokens a second against the length of a sequence; apart by micro-batches where lengths come with several."""
    if searched(results):
        return []
    rows = [row for row in results.rows if row.steps]
    points = [(row.name, row.model, row.r, row.vram, row.tokens) for row in rows]
    once = len(points) == len(set(points))
    return _each(
        results.model_copy(update={"rows": rows}),
        "Tokens/s by length",
        lambda row: (row.model, row.r, row.vram, *(() if once else (row.k, row.rows))),
        _speeds,
        look,
    )


def _speeds(results: Results, rows: list[Row], look: dict[str, Look]) -> str | None:
    lines = {name: sorted(of, key=lambda row: row.tokens) for name, of in _by_name(rows).items()}
    lengths = sorted({row.tokens for of in lines.values() if len(of) > 1 for row in of})
    if not lengths:
        return None
    figure = _figure(3.6)
    axes = figure.subplots()
    for name, of in lines.items():
        found = [(row.tokens, row.tokens_per_second) for row in of]
        known = [(x, speed) for x, speed in found if speed is not None]
        x = [each for each, _ in known]
        colour, marker = look[name].colour, look[name].marker
        axes.fill_between(x, [s.p20 for _, s in known], [s.p80 for _, s in known], color=colour, alpha=0.2, linewidth=0)
        axes.plot(x, [s.median for _, s in known], color=colour, marker=marker, markersize=5)
    _doubling(axes, lengths)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_number)
    works = list(dict.fromkeys(row.work for row in rows))
    axes.set_xlabel("tokens of a sequence" + (f" (a step: {', '.join(works)})" if len(works) < 7 else ""))
    axes.set_ylabel("tokens/s; band: 20th to 80th percentile")
    return _svg(_legend(figure, _handles(lines, look)))


def _caps(results: Results, rows: list[Row], look: dict[str, Look]) -> str | None:
    """The longest context against the card's memory."""
    if not searched(results):
        return None
    found = _by_name(row for row in rows if row.status == "ok" and row.vram is not None)
    lines = {name: sorted((row.vram or 0.0, row.tokens) for row in of) for name, of in found.items()}
    if not any(len(line) > 1 for line in lines.values()):
        return None
    figure = _figure(3.6)
    axes = figure.subplots()
    for name, line in lines.items():
        axes.plot(*zip(*line, strict=True), color=look[name].colour, marker=look[name].marker, markersize=5)
        axes.annotate(f"{line[-1][1]:,}", line[-1], xytext=(6, -3), textcoords="offset points", fontsize=9)
    tokens = [tokens for line in lines.values() for _, tokens in line]
    if max(tokens) > 16 * min(tokens):
        axes.set_yscale("log", base=2)
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_number)
    axes.set_xticks(sorted({gib for line in lines.values() for gib, _ in line}))
    axes.margins(x=0.1)
    axes.set_xlabel("GiB of VRAM that the process may take")
    axes.set_ylabel("tokens of the longest sequence")
    return _svg(_legend(figure, _handles(lines, look)))


def _losses(results: Results, look: dict[str, Look]) -> list[Plot]:
    """The losses of all methods at a work on top of each other; a panel for each work."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.rows:
        if len(row.losses) > 1 and not searched(results):
            groups.setdefault(row.group, []).append(row)
    groups = {key: rows for key, rows in groups.items() if len(rows) > 1}
    if not groups:
        return []
    across = min(_LOSS_COLUMNS, len(groups))
    down = -(-len(groups) // across)
    figure = _figure(0.5 + 2.2 * down)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, rows in zip(panels, groups.values(), strict=False):
        for n, row in enumerate(rows):
            # Methods that agree would hide one another: the later, the thinner.
            width = 1.2 + 4.0 * (1 - n / (len(rows) - 1))
            axes.plot(range(1, len(row.losses) + 1), row.losses, color=look[row.name].colour, linewidth=width)
        place = _place(rows, results.rows, at_least=False)
        axes.set_title("\n".join(filter(None, (place, rows[0].work))), fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    figure.supxlabel("optimizer step", fontsize=10)
    names = _by_name(row for rows in groups.values() for row in rows)
    return [Plot("Loss on the same data", _svg(_legend(figure, _handles(names, look, marker=False))))]


def _planned(results: Results, look: dict[str, Look]) -> list[Plot]:
    """What was planned against what was measured: on the diagonal, the plan was right."""
    figures: list[tuple[str, list[tuple[Row, float, float]]]] = [("GiB at the peak", []), ("s a step", [])]
    for row in results.rows:
        if row.predicted and row.memory_gib:
            figures[0][1].append((row, row.memory_gib, row.predicted.allocated))
        if row.predicted and row.steps:
            seconds = sorted(step.seconds for step in row.steps)[len(row.steps) // 2]
            figures[1][1].append((row, seconds, row.predicted.seconds))
    figures = [(unit, points) for unit, points in figures if len(points) > 1]
    if not figures:
        return []
    figure = _figure(3.6)
    for axes, (unit, points) in zip(figure.subplots(1, len(figures), squeeze=False).flat, figures, strict=True):
        for row, measured, planned in points:
            axes.plot(measured, planned, look[row.name].marker, color=look[row.name].colour, markersize=6, alpha=0.85)
        ends = [f(value for _, *pair in points for value in pair) for f in (min, max)]
        if ends[1] > 16 * ends[0] > 0:
            axes.set_xscale("log")
            axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(_number)
        axes.axline((ends[1], ends[1]), (ends[0], ends[0]), color=_FAINT, linewidth=1, zorder=0)
        axes.set_box_aspect(1)
        axes.set_xlabel(f"{unit}, measured")
        axes.set_ylabel("planned")
    names = _by_name(row for _, points in figures for row, *_ in points)
    return [Plot("Planned against measured", _svg(_legend(figure, _handles(names, look, line=False))))]


# --- drawing ----------------------------------------------------------------------------------------------------------


def _by_name(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.name, []).append(row)
    return found


def _place(rows: Sequence[Row], among: Sequence[Row], at_least: bool = True) -> str:
    """`llama-8b, r=16, 24 GiB`: what rows share and not all have. at_least: name the model anyway."""

    def tells(name: str) -> bool:
        here, there = ({getattr(row, name) for row in of} for of in (rows, among))
        return len(here) == 1 < len(there)

    row = rows[0]
    said = [
        *([short(row.model)] if at_least or tells("model") else []),
        *([f"r={row.r}"] if tells("r") else []),
        *([f"{row.vram:g} GiB"] if tells("vram") and row.vram is not None else []),
    ]
    return ", ".join(said)


def _number(value: float, _: float) -> str:
    return f"{value:,.10g}"


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _doubling(axes: Axes, lengths: Sequence[int]) -> None:
    """An axis of lengths, on which each doubling is as wide."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
    axes.minorticks_off()


def apart(svg: str, n: int) -> str:
    """A drawing whose ids no other has on its page, where it is the n-th."""
    return re.sub(r'(\bid="|#)([mp][0-9a-f]{10})\b', rf"\1p{n}\2", svg)


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)


def _handles(
    names: Iterable[str], look: dict[str, Look], line: bool = True, marker: bool = True
) -> list[tuple[Any, str]]:
    """A legend's entries: methods as they are drawn."""
    from matplotlib.lines import Line2D

    return [
        (
            Line2D(
                *([], []),
                color=look[name].colour,
                linestyle="-" if line else "",
                marker=look[name].marker if marker else "",
                markersize=5,
            ),
            name,
        )
        for name in names
    ]


def _legend(figure: Figure, entries: Sequence[tuple[Any, str]]) -> Figure:
    """Above the axes, where no data is, in as many columns as there is room for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(min(len(entries), 5), 0, -1):
        handles, labels = zip(*entries, strict=True)
        legend = figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.4)
        if (
            columns == 1 or legend.get_window_extent(renderer).width < 0.9 * figure.bbox.width
        ):  # others' fonts are wider
            break
        legend.remove()
    return figure


def _svg(figure: Figure) -> str:
    """One <svg> element whose text is text, whose ink is the page's, and whose size is the page's to choose."""
    written = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :].strip()  # without prolog and doctype
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # `axes_1` is in every drawing, and ids must differ on a page
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', svg, count=1)
    return svg.replace(_INK, "currentColor").replace(_FAINT, "var(--faint)")
