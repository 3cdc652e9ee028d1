"""Reads files, directories and the Hub as rows, each with the file and line where it was written.

.jsonl, .ndjson, .json (a list, or one row a line), .csv, .tsv, .parquet, and .txt, which is one row.

Local files are read here and not through `datasets`: its readers guess types (a CSV cell "null" becomes nothing, "42" a
number), take file names for glob patterns, write a second copy into a cache, and can't tell which line was wrong.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora.config import DatasetConfig
from qlora.data.problems import Problems
from qlora.errors import DataError

Row = tuple[str, Any]  # "file:line", and the row as it was written


def read_rows(spec: DatasetConfig, problems: Problems) -> Iterator[Row]:
    """The rows that `spec` names, in order; those that can't be read go to `problems`.

    Raises DataError where there is nothing of that name, split or suffix.
    """
    path = Path(spec.path).expanduser()
    if not path.exists():
        return _hub_rows(spec)
    if spec.name is not None:
        raise DataError(f"{spec.path}: `name` chooses a configuration of a Hub dataset; this is a local path")
    if path.is_dir():
        files = _data_files(path, spec.split)
    elif spec.split != "train":
        raise DataError(f"{spec.path}: a file is all `train`: it has no split {spec.split!r}")
    elif path.suffix.lower() not in _READERS:
        raise DataError(f"{spec.path}: can't read {path.suffix or 'a file without suffix'}; {_SUFFIXES} can be read")
    else:
        files = [path]
    return (row for file in files for row in _READERS[file.suffix.lower()](file, problems))


def _data_files(directory: Path, split: str) -> list[Path]:
    """Files of a split: those named after it (`train.jsonl`, `test-00000-of-00002.parquet`, `test/a.jsonl`).

    Where no name begins with "train", the whole directory is `train`. Reading everything that lies there would train on
    the test files of most directories.
    """
    parts = {file: file.relative_to(directory).parts for file in sorted(directory.rglob("*")) if file.is_file()}
    files = [file for file in parts if file.suffix.lower() in _READERS and not any(p[0] == "." for p in parts[file])]
    if not files:
        raise DataError(f"{directory}: a directory without {_SUFFIXES} files")
    name = re.compile(rf"{re.escape(split)}(?![a-zA-Z0-9])")
    named = [file for file in files if any(name.match(part) for part in parts[file])]
    if not named and split != "train":
        raise DataError(f"{directory}: no file of split {split!r} among {', '.join(file.name for file in files[:10])}")
    return named or files


def _json_rows(path: Path, problems: Problems) -> Iterator[Row]:
    """A JSON list, or an object a line: told apart by the first character, as either comes under either suffix."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith(b"["):
            yield from _json_list(path, problems)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):  # in bytes: a line ends at \n only, not at U+2028
            where = f"{path}:{number}"
            try:
                text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
                if text.strip():
                    yield where, _DECODER.decode(text.rstrip("\r\n"))
            except (ValueError, RecursionError) as error:
                problems.add(where, _unreadable(error))


def _json_list(path: Path, problems: Problems) -> Iterator[Row]:
    """The rows of a JSON list, decoded one by one so that each has its line."""
    text = _text(path, problems)
    if text is None:
        return
    space = re.compile(r"\s*")

    def skip(position: int) -> int:
        match = space.match(text, position)
        return match.end() if match else position

    position, line, counted = skip(text.index("[") + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = _DECODER.raw_decode(text, position)
            yield f"{path}:{line}", row
        except _Refused as error:
            problems.add(f"{path}:{line}", _unreadable(error))
            # The row is well-formed, only refused: plain decoding finds where it ends, and reading goes on.
            position = json.JSONDecoder().raw_decode(text, position)[1]
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            problems.add(f"{path}:{at}", _unreadable(error))
            return
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            got = repr(text[position : position + 20]) if position < len(text) else "the end of the file"
            problems.add(f"{path}:{line}", f"not JSON: expected ',' or ']' after a row; got {got}")
            return


def _csv_rows(path: Path, problems: Problems) -> Iterator[Row]:
    text = _text(path, problems)
    if text is None:
        return
    csv.field_size_limit(2**31 - 1)  # 128 KiB by default, less than a long document
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    problems.add(where, f"expected different column names; got {', '.join(header)}")
                    return
            elif len(cells) not in (0, len(header)):
                problems.add(where, f"expected {len(header)} cells, as in the header; got {len(cells)}")
            elif cells:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        problems.add(f"{path}:{line}", f"not CSV: {error}")


def _parquet_rows(path: Path, problems: Problems) -> Iterator[Row]:
    import pyarrow  # what `datasets` reads Parquet with
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(f"{path}:{number + 1}", f"not readable as Parquet: {error}")


def _text_rows(path: Path, problems: Problems) -> Iterator[Row]:
    text = _text(path, problems)
    if text is not None:
        yield f"{path}:1", {"text": text}


def _text(path: Path, problems: Problems) -> str | None:
    """All of a file, or None after telling `problems` on which line it is not UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problems.add(f"{path}:{line}", _unreadable(error))
        return None


def _hub_rows(spec: DatasetConfig) -> Iterator[Row]:
    """Rows of a dataset on the Hub, if `path` can be the name of one; else the error for a missing file."""
    path = Path(spec.path)
    missing = f"{spec.path}: no such file or directory{_nearest(path.expanduser())}"
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", spec.path) or path.suffix.lower() in _READERS:
        raise DataError(missing)

    import datasets  # a second to import, and not needed for local files
    from datasets.exceptions import DatasetsError

    try:
        table = datasets.load_dataset(spec.path, spec.name, split=spec.split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"{missing}\n  and as a dataset on the Hub: {error}") from error
    return ((f"{spec.path}:{number}", row) for number, row in enumerate(table, 1))


def _nearest(path: Path) -> str:
    """What a person may have meant by a path that is not there."""
    if not path.parent.is_dir():
        return f"\n  there is no directory {path.parent}"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=3, cutoff=0.5)
    return f"\n  did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""


_READERS: dict[str, Callable[[Path, Problems], Iterator[Row]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
_SUFFIXES = ", ".join(_READERS)


class _Refused(ValueError):
    """JSON that Python would read, but not as it was meant."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Refused(f"`{twice}`: expected each key once; got it {names.count(twice)} times")
    return row


def _constant(name: str) -> float:
    raise _Refused(f"not JSON: expected a value; got {name}")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _unreadable(error: Exception) -> str:
    match error:
        case _Refused():
            return str(error)
        case json.JSONDecodeError():
            return f"not JSON: {error.msg} at column {error.colno}"
        case UnicodeDecodeError():
            return f"not UTF-8: byte {error.object[error.start]:#04x} ({error.reason})"
        case _:
            return f"not JSON: {error}"
