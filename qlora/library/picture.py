"""A report of interference as a picture: layers x kinds of weights, and below them how everyone answers.

One SVG that stands alone, on a card of its own in the reader's light or dark colours. What a cell says is in how much
of its colour it has, so that the same cells are right on both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from qlora.library.interference import BASE, COMBINED, Overlap, Report, Score, grouped, layer_and_kind

__all__ = ["draw"]

# Okabe and Ito's palette, which the colour-blind tell apart.
_BLUE, _SKY, _ORANGE, _GREEN, _PINK, _GREY = "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#b4659a", "#8c959f"
_WIDTH, _MARGIN, _LABELS, _SCALE = 880, 28, 86, 104  # px: of all, around, left of the cells, right of them
_ROW, _GAP, _BAR = 15, 1.5, 17
_STYLE = """
text{font:12px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}.t{font-size:15px;font-weight:600}
.h{font-size:13px;font-weight:600}.ink{fill:#1f2328}.soft{fill:#59636e}.card{fill:#fff;stroke:#d1d9e0}.none{fill:#f3f5f7}
@media(prefers-color-scheme:dark){.ink{fill:#f0f6fc}.soft{fill:#9198a1}.card{fill:#0d1117;stroke:#3d444d}
.none{fill:#1a2029}}"""


def draw(report: Report) -> str:
    """The report as SVG, 880 px wide."""
    pairs = len(report.overlaps)
    cells = grouped((each for pair in report.overlaps.values() for each in pair), layer_and_kind)
    of = f" (mean of {pairs} pairs)" if pairs > 1 else ""
    conflicts = [each.sign_conflict for each in cells.values() if each.sign_conflict is not None]
    span = max([0.02, *(abs(0.5 - value) for value in conflicts)])
    drawn = _Drawing()
    drawn.text(_MARGIN, "Interference of adapters", "t ink")
    drawn.down(20)
    drawn.text(_MARGIN, report.how(), "soft")
    drawn.down(30)

    def conflict(each: Overlap) -> tuple[str, float] | None:
        value = each.sign_conflict
        return None if value is None else (_ORANGE if value > 0.5 else _BLUE, abs(value - 0.5) / span)

    title = "Sign conflict", f"share of what meets that cancels; 50% is chance{of}"
    drawn.heatmap(*title, cells, conflict, [(_BLUE, 1, f"{0.5 - span:.0%}"), (_ORANGE, 1, f"{0.5 + span:.0%}")])
    for what, said, colour in (("writes", "what they write", _GREEN), ("reads", "what they read", _PINK)):
        values = {name: getattr(each, what) for name, each in cells.items()}
        most = max([0.01, *(value for value in values.values() if value is not None)])
        n = ("writes", "reads").index(what)
        chance = sum(each.chance[n] for each in cells.values()) / max(len(cells), 1)

        def share(
            each: Overlap, what: str = what, colour: str = colour, most: float = most
        ) -> tuple[str, float] | None:
            value = getattr(each, what)
            return None if value is None else (colour, value / most)

        title = f"Overlap of {said}", f"share of one space that lies in the other; chance gives {chance:.0%}{of}"
        drawn.heatmap(*title, cells, share, [(colour, 0, "0%"), (colour, 1, f"{most:.0%}")])
    drawn.layers(list(dict.fromkeys(layer for layer, _ in cells)))
    if report.scores:
        drawn.bars(report.scores, report.who())
    return drawn.svg(f"Interference: {report.how()}")


class _Drawing:
    """Grows from its top down."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._y = _MARGIN + 12.0

    def down(self, pixels: float) -> None:
        self._y += pixels

    def text(self, x: float, text: str, style: str, dy: float = 0, anchor: str = "start") -> None:
        where = f'x="{x:g}" y="{self._y + dy:g}" class="{style}" text-anchor="{anchor}"'
        self._parts.append(f"<text {where}>{escape(text)}</text>")

    def box(self, x: float, y: float, width: float, height: float, colour: str, share: float = 1) -> None:
        fill = f'fill="{colour}" fill-opacity="{max(share, 0):.3g}"' if colour else 'class="none"'
        size = f'x="{x:.6g}" y="{y:.6g}" width="{max(width, 0):.5g}" height="{height:.5g}" rx="1.5"'
        self._parts.append(f"<rect {size} {fill}/>")

    def heatmap(
        self,
        title: str,
        about: str,
        cells: Mapping[tuple[str, str], Overlap],
        look: Callable[[Overlap], tuple[str, float] | None],
        ends: Sequence[tuple[str, float, str]],
    ) -> None:
        """A row for each kind, a column for each layer. look: a cell's colour and share of it; ends: of the scale."""
        layers, kinds = (list(dict.fromkeys(key[n] for key in cells)) for n in (0, 1))
        width = (_WIDTH - 2 * _MARGIN - _LABELS - _SCALE) / len(layers)
        self._parts.append(
            f'<text x="{_MARGIN}" y="{self._y:g}" class="h ink">{escape(title)}'
            f'<tspan dx="10" class="soft" font-weight="400">{escape(about)}</tspan></text>'
        )
        self.down(10)
        top = self._y
        for kind in kinds:
            self.text(_MARGIN + _LABELS - 8, kind[:13], "soft", dy=_ROW - 3.5, anchor="end")
            for n, layer in enumerate(layers):
                each = cells.get((layer, kind))
                colour, share = (look(each) if each else None) or ("", 0)
                place = _MARGIN + _LABELS + n * width, self._y, width - _GAP, _ROW - _GAP
                self.box(*place, "")
                if colour and each:
                    self.box(*place, colour, share)
            self.down(_ROW)
        (low, little, _), (high, much, _) = ends
        stops = (
            [(0, low, little), (0.5, low, 0), (0.5, high, 0), (1, high, much)]
            if low != high
            else [(0, low, little), (1, high, much)]
        )
        name, x = f"scale{int(top)}", _WIDTH - _MARGIN - _SCALE + 22
        inner = "".join(f'<stop offset="{at}" stop-color="{c}" stop-opacity="{share}"/>' for at, c, share in stops)
        self._parts.append(f'<linearGradient id="{name}" x1="0" y1="1" x2="0" y2="0">{inner}</linearGradient>')
        place = x, top + _ROW, 12, self._y - top - 2 * _ROW
        self.box(*place, "")
        self.box(*place, f"url(#{name})")
        for (_, _, said), y in zip(ends, (self._y - _ROW, top + _ROW + 9), strict=True):
            self._parts.append(f'<text x="{x + 19:g}" y="{y:g}" class="soft">{escape(said)}</text>')
        self.down(26)

    def layers(self, layers: Sequence[str]) -> None:
        """What the columns are."""
        self.down(-14)
        width = (_WIDTH - 2 * _MARGIN - _LABELS - _SCALE) / max(len(layers), 1)
        every = max(round(len(layers) / 10 / 5) * 5, 1) if len(layers) > 12 else 1
        for n, layer in enumerate(layers):
            if n % every == 0:
                self.text(_MARGIN + _LABELS + (n + 0.5) * width - _GAP / 2, layer, "soft", anchor="middle")
        self.text(_MARGIN + _LABELS - 8, "layer", "soft", anchor="end")
        self.down(36)

    def bars(self, scores: Mapping[str, Mapping[str, Score]], who: Sequence[str]) -> None:
        """How everyone does on each task, two tasks side by side."""
        half = (_WIDTH - 2 * _MARGIN) / 2
        tasks = list(scores.items())
        for first in range(0, len(tasks), 2):
            top = self._y
            for column, (task, theirs) in enumerate(tasks[first : first + 2]):
                self._y, x = top, _MARGIN + column * half
                counted = all(score.exact_match is not None for score in theirs.values())
                said = "answered to the letter" if counted else "loss: less is better"
                self._parts.append(
                    f'<text x="{x:g}" y="{self._y:g}" class="h ink">{escape(task[:24])}'
                    f'<tspan dx="8" class="soft" font-weight="400">held-out rows, {said}</tspan></text>'
                )
                self.down(10)
                most = 1.0 if counted else max(score.loss for score in theirs.values()) or 1.0
                room = half - _LABELS - 30 - 66
                for name in who:
                    value = (theirs[name].exact_match if counted else theirs[name].loss) or 0.0
                    colour = {BASE: _GREY, COMBINED: _ORANGE, task: _BLUE}.get(name, _SKY)
                    self.text(x + _LABELS + 22, name[:18], "ink" if name in (task, COMBINED) else "soft", 12, "end")
                    self.box(x + _LABELS + 30, self._y + 2, room, _BAR - 5, "")
                    self.box(x + _LABELS + 30, self._y + 2, room * value / most, _BAR - 5, colour)
                    shown = f"{value:.1%}" if counted else f"{value:.3g}"
                    self.text(x + _LABELS + 38 + room, shown, "ink", dy=12)
                    self.down(_BAR)
            self.down(28)
        self.down(-14)

    def svg(self, title: str) -> str:
        height = self._y + _MARGIN - 14
        size = f'viewBox="0 0 {_WIDTH} {height:g}" width="{_WIDTH}" height="{height:g}"'
        card = f'<rect x=".5" y=".5" width="{_WIDTH - 1}" height="{height - 1:g}" rx="8" class="card"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(title)}</title>'
        return "\n".join([f"{head}<style>{_STYLE}</style>", card, *self._parts, "</svg>", ""])
