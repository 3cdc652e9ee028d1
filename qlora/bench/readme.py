"""Tables in a README that are made of result files, so that no figure there is older than its measurement.

    <!-- bench: cpu_cpu_2026-11-22.json -->
    ... a table, written by `python -m qlora.bench.readme` ...
    <!-- /bench -->

The first line names one or more files of `benchmarks/results`, and may say which of their columns and methods to show
and what to compare with: `columns=step,method,speed methods=qlora,hf-qlora against=hf-qlora` (`tables.COMPACT` has the
columns). A file of a script in `benchmarks/` has its table with it. Both lines stand at the beginning of a line;
indented, they are an example.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.bench.results import read
from qlora.bench.tables import byline, command, compact, mark
from qlora.errors import DataError, QLoRAError

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "benchmarks/README.md")
RESULTS = "benchmarks/results"
_OPTIONS = ("columns", "methods", "against")
_START = re.compile(r"<!--\s*bench\b:?(.*)")
_END = re.compile(r"<!--\s*/\s*bench\b.*")


@dataclass(frozen=True, slots=True)
class Block:
    """A table's place. start, end: 0-based numbers of the lines around it. asked: what the first of them says."""

    start: int
    end: int
    asked: str


def blocks(text: str, name: str = "README.md") -> list[Block]:
    """The blocks of a text, in order. Raises DataError at a start without an end, or the other way round.

    name  what errors call the text
    """
    found: list[Block] = []
    opened: tuple[int, str] | None = None
    for n, line in enumerate(text.splitlines()):
        if start := _START.match(line):
            if opened:
                raise DataError(f"{name}:{opened[0] + 1}: this block has no `<!-- /bench -->` before the next begins")
            asked = re.fullmatch(r"<!-- bench:(.*\S.*)-->", line.rstrip())
            if not asked:
                raise DataError(f"{name}:{n + 1}: `{start[0]}` is not `<!-- bench: FILE.json -->` on a line of its own")
            opened = n, asked[1].strip()
        elif _END.match(line):
            if not opened:
                raise DataError(f"{name}:{n + 1}: a block ends that has not begun")
            found.append(Block(opened[0], n, opened[1]))
            opened = None
    if opened:
        raise DataError(f"{name}:{opened[0] + 1}: this block has no `<!-- /bench -->`")
    return found


def update(text: str, folder: Path, name: str = "README.md") -> str:
    """The text with each block's table made anew from its files, and every other line as it was.

    folder  of the result files
    name    what errors call the text

    Raises DataError, with the line, at a block that is malformed or names a file, column or method that is not there.
    """
    lines = text.splitlines(keepends=True)
    for block in reversed(blocks(text, name)):  # from the end, so that line numbers stay
        try:
            table = _table(block.asked, folder)
        except DataError as error:
            raise DataError(f"{name}:{block.start + 1}: {error}") from None
        lines[block.start + 1 : block.end] = [f"{line}\n" for line in table.splitlines()]
    return "".join(lines)


def _table(asked: str, folder: Path) -> str:
    """What stands between the lines of a block: for each file a table, and where it is from."""
    options: dict[str, str] = {}
    files = []
    try:
        words = shlex.split(asked)  # a method's name may have blanks
    except ValueError as error:
        raise DataError(f"`{asked}`: {error}") from None
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            files.append(word)
        elif key not in _OPTIONS or not value:
            raise DataError(f"`{word}` is not one of {', '.join(f'{option}=...' for option in _OPTIONS)}")
        else:
            options[key] = value
    if not files:
        raise DataError("no file is named")
    parts = []
    for file in files:
        if Path(file).name != file:
            raise DataError(f"`{file}` is not the name of a file in {RESULTS}")
        own = _own_table(folder / file)
        if own is not None:
            parts.append(own)
            continue
        results = read(folder / file)
        columns, methods = (options[key].split(",") if key in options else None for key in ("columns", "methods"))
        made_by = f"`{command(results)}`, in " if command(results) else ""
        source = f"({made_by}`{RESULTS}/{file}`: {mark(byline(results))}.)"
        parts += [compact(results, columns, methods, options.get("against")), source]
    return "\n\n".join(parts)


def _own_table(path: Path) -> str | None:
    """The table that a script of `benchmarks/` made of its figures and left in their file; None: it left none."""
    try:
        written = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None  # `read` says what is wrong
    if not isinstance(written, dict) or not isinstance(written.get("table"), str):
        return None
    day = str(written.get("date"))[:10]
    return f"{written['table']}\n\n(`{mark(str(written.get('command')))}`, in `{RESULTS}/{path.name}`: {day}.)"


def stale(pages: Sequence[str] = PAGES, root: Path = ROOT) -> Iterator[tuple[Path, str, str]]:
    """The pages whose tables are not what the files give: path, what it says, what it should say."""
    for name in pages:
        path = root / name
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            made = update(text, root / RESULTS, name)
            if made != text:
                yield path, text, made


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m qlora.bench.readme", description="Tables from result files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a table is not its files'")
    asked = parser.parse_args(arguments)
    try:
        differing = list(stale(root=root))
    except QLoRAError as error:
        print(error.report(), file=sys.stderr)
        return 1
    for path, text, made in differing:
        name = str(path.relative_to(root))
        if asked.check:
            print(
                "\n".join(difflib.unified_diff(text.splitlines(), made.splitlines(), name, "the files", "", "", 0, ""))
            )
        else:
            path.write_text(made, encoding="utf-8")
            print(f"{name}: written")
    if asked.check and differing:
        print("the tables are not what the result files give: make readme-tables", file=sys.stderr)
    return int(asked.check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
