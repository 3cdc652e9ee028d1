"""`qlora bench` and its kin, for people: what is asked for, measured, written and printed.

What measures is imported when something is measured: a report does not wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora.bench import tables
from qlora.bench.compare import compare_files, share
from qlora.bench.environment import TREE, slug
from qlora.bench.page import page
from qlora.bench.results import Results, read
from qlora.bench.suites import load_suite
from qlora.errors import MachineError, Problem, RecipeError

# Beside the suites in the sources; where an installed wheel has none, here.
RESULTS = TREE / "benchmarks" / "results" if (TREE / "benchmarks").is_dir() else Path()


def bench(suite: str | None, asked: Mapping[str, Any], out: str | None) -> int:
    """Run a suite, and print its table. Returns the exit status: 1 where a method failed, or losses do not agree.

    suite  None: the one for this machine
    asked  keys of the suite that were given on the command line; None: as the suite has it
    """
    from qlora.bench.harness import run_suite
    from qlora.machine import pick_device
    from qlora.model.cache import cache_home

    console, device, home = Console(highlight=False), pick_device(), cache_home("auto")
    assert home is not None
    if not console.is_terminal:
        console.width = 140  # a log is not a window, whose width it would be cut to
    instead = {key: value for key, value in asked.items() if value is not None}
    for key, kind in (("r", int), ("vram", float)):
        if key in instead:
            instead[key] = [_number(key, text, kind) for text in instead[key]]
    if ("model" in instead) != ("shape" in instead):  # what is named takes the place of both
        instead = {"model": [], "shape": []} | instead
    name, chosen = load_suite(suite or ("cpu" if device.type == "cpu" else "throughput"), instead)

    def say(text: str) -> None:
        console.print(text, markup=False)

    def place(results: Results) -> Path:
        where = "cpu" if results.device == "cpu" else slug(results.device_name)
        return Path(out) if out else RESULTS / f"{name}_{where}_{results.date[:10]}.json"

    results = run_suite(name, chosen, device, place, home / "bench", say)  # for what methods leave for the next run
    console.print(tables.terminal(results))
    if results.rows:
        console.print(f"every figure is in {place(results)}", markup=False)
    return _verdict(results, console)


def _number(key: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise RecipeError(Problem(f"--{key}", None, key, f"`{text}` is not a number", "")) from None


def _verdict(results: Results, console: Console) -> int:
    apart = [agreement for agreement in results.agreements if not agreement.agree]
    for each in apart:
        methods = ", ".join(each.methods)
        console.print(f"[bold red]THE LOSSES DO NOT AGREE[/]: {methods} at {each.work}: this compares unlike work")
    failed = [row for row in results.rows if row.status == "failed"]
    for row in failed:
        console.print(f"[bold red]{row.name} at {row.work} failed[/]")
        console.print(row.traceback or row.error, markup=False)
    return 1 if apart or failed else 0


def report(files: Sequence[str], out: str | None) -> None:
    """Write results' tables as Markdown, and one page with plots."""
    results = [read(Path(file)) for file in files]
    stem = Path(out) if out else Path(files[0]).with_suffix("")
    try:
        for path, text in (
            (stem.with_name(stem.name + ".md"), tables.markdown(results)),
            (stem.with_name(stem.name + ".html"), page(results)),
        ):
            path.write_text(text)
            print(path)
    except OSError as error:
        raise MachineError(f"{stem}: cannot be written: {error.strerror or error}") from None


def compared(old: str, new: str, threshold: str) -> int:
    """Print how a newer result compares with an older one. Returns 1 where it is worse."""
    try:
        tolerated = share(threshold)
    except ValueError as error:
        raise RecipeError(Problem("--threshold", None, "", str(error), "")) from None
    return compare_files(Path(old), Path(new), tolerated, Console(highlight=False))
