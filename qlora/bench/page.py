"""Result files as one HTML page: what was measured on, the tables, the plots. It needs no network and no script."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from qlora.bench.plots import Plot, apart, looks, plots
from qlora.bench.results import Results, Row
from qlora.bench.tables import Grid, byline, command, grids, notes

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --quiet: #626a73; --faint: #c9ced4; --paper: #fff; --band: #f5f6f8;
  --alarm: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --quiet: #9aa3ad; --faint: #444b54; --paper: #15181c;
  --band: #1d2127; --alarm: #ff8a80; } }
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 0; padding-top: 1.5rem; border-top: 1px solid var(--faint); }
h1 + section > h2 { margin-top: 1rem; }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
p.by { margin: 0 0 1rem; color: var(--quiet); }
pre { margin: .5rem 0; padding: .6rem .8rem; background: var(--band); border-radius: 6px; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; }
th { vertical-align: bottom; font-weight: 600; color: var(--quiet); border-bottom: 1px solid var(--quiet); }
td { white-space: nowrap; }
.word { text-align: left; }
tr.starts td { border-top: 1px solid var(--faint); }
tbody tr:first-child td { border-top: 0; }
tr.bad td { color: var(--quiet); }
tr.bad td.said { text-align: left; white-space: normal; }
ul { padding-left: 1.2rem; margin: 1rem 0; color: var(--quiet); }
.alarm { color: var(--alarm); font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: .25rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--quiet); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .5rem 0; font-size: 14px; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(results: Sequence[Results]) -> str:
    """The whole page, a section for each file. Raises MachineError without matplotlib."""
    look = looks(results)
    title = " · ".join(dict.fromkeys(each.title for each in results)) or "no results"
    number = itertools.count()
    sections = "\n".join(
        _section(each, [Plot(plot.title, apart(plot.svg, next(number))) for plot in plots(each, look)])
        for each in results
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>qlora bench</h1>
{sections}
</body>
</html>
"""


def _section(results: Results, drawn: Sequence[Plot]) -> str:
    parts = [f"<section>\n<h2>{escape(results.title)}</h2>", f'<p class="by">{escape(byline(results))}</p>']
    if command(results):
        parts.append(f"<pre>{escape(command(results))}</pre>")
    tables = [(_tag("h3", grid.title) + "\n" if grid.title else "") + _table(grid) for grid in grids(results)]
    parts += tables[:1]
    said = [_tag("li", note.text, "alarm" if note.alarming else "") for note in notes(results)]
    parts += ["<ul>", *said, "</ul>"] if said else []
    if drawn:
        figures = [f"<figure><figcaption>{escape(plot.title)}</figcaption>{plot.svg}</figure>" for plot in drawn]
        parts += ['<div class="plots">', *figures, "</div>"]
    parts += tables[1:]
    parts += [_failure(row) for row in results.rows if row.traceback or row.error]
    parts.append(f"<h3>Measured on</h3>\n{_facts(results.environment)}")
    settings = json.dumps(results.settings, indent=1, ensure_ascii=False, default=str)
    parts.append(f"<details><summary>the suite's settings</summary><pre>{escape(settings)}</pre></details>")
    return "\n".join([*parts, "</section>"])


def _table(grid: Grid) -> str:
    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(_tag(tag, text, "word" if n < grid.keys else "") for n, text in enumerate(texts))

    rows = []
    for row in grid.rows:
        kind = " ".join(word for word, so in (("starts", row.starts), ("bad", not row.ok)) if so)
        figures = [text for text in row.cells[grid.keys :] if text]
        if len(figures) == 1 and not row.ok:
            # What became of a method that has no figures may be long: it gets the width of all of them.
            said = _tag("td", figures[0], "said", f' colspan="{len(grid.heads) - grid.keys}"')
            html = cells("td", row.cells[: grid.keys]) + said
        else:
            html = cells("td", row.cells)
        rows.append(f'<tr class="{kind}">{html}</tr>')
    body = "\n".join(rows)
    heads = f"<thead><tr>{cells('th', grid.heads)}</tr></thead>"
    return f'<div class="wide"><table>\n{heads}\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _tag(tag: str, text: str, kind: str = "", more: str = "") -> str:
    """An element that holds text. kind: its class. more: attributes, ready to stand in HTML."""
    return f"<{tag}{f' class={kind}' if kind else ''}{more}>{escape(text)}</{tag}>"


def _failure(row: Row) -> str:
    text = (row.traceback or row.error or "").strip()
    return (
        f"<details><summary>{escape(row.name)} at {escape(row.work)}: {escape(row.status)}</summary>"
        f"<pre>{escape(text)}</pre></details>"
    )


def _facts(environment: Mapping[str, Any]) -> str:
    """Whatever the file says of its machine; the command stands at the head of the section."""
    told = [(key, _said(value)) for key, value in environment.items() if key != "command" and value is not None]
    rows = [f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(text)}</dd>" for key, text in told]
    return "\n".join(["<dl>", *rows, "</dl>"])


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')} {_said(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_said(each) for each in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
