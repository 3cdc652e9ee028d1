"""Reads files, directories and the Hub as rows, each with the file and line where it was written.

.jsonl, .ndjson, .json (a list, or one row a line), .csv, .tsv, .parquet, and .txt, which is one row.

A row of JSON, CSV or Parquet is at most 8 MiB, some two million tokens: more is a mistake, found before it is decoded.

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
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora.config import DatasetConfig
from qlora.data.problems import Problems
from qlora.errors import DataError

Row = tuple[str, Any]  # "file:line", and the row as it was written

_MOST_BYTES = 8 << 20  # of a row; a .txt file, which is one, may be of any size
_TOO_LARGE = f"expected a row of at most {_MOST_BYTES >> 20} MiB; got "


def read_rows(spec: DatasetConfig, problems: Problems) -> Iterator[Row]:
    """The rows that `spec` names, in order; those that can't be read go to `problems`.

    Raises DataError where there is nothing of that name, split or suffix.
    """
    try:
        path = Path(spec.path).expanduser()
        return _rows_of(spec, path, problems) if path.exists() else _hub_rows(spec, problems)
    except (OSError, RuntimeError) as error:  # a directory that may not be searched, a ~user that is not there
        raise DataError(f"{spec.path}: cannot be read: {error}") from error


def _rows_of(spec: DatasetConfig, path: Path, problems: Problems) -> Iterator[Row]:
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
    return (row for file in files for row in _read(file, problems))


def _read(file: Path, problems: Problems) -> Iterator[Row]:
    """The rows of one file, whatever becomes of it meanwhile."""
    where = f"{file}:1"
    try:
        if not file.is_file():  # opening a pipe would wait for somebody to write into it
            problems.add(where, "expected a file; got a pipe, a device or a socket", rest_unread=True)
            return
        with file.open("rb") as content:
            start = content.read(64)
        for magic, (what, advice) in _NO_ROWS.items():
            if start.startswith(magic):
                problems.add(where, f"expected rows; got {what}", rest_unread=True, advice=advice)
                return
        if file.suffix.lower() != ".parquet" and (encoding := _wide_encoding(start[:4])):
            problems.add(where, f"expected UTF-8; got {encoding}", rest_unread=True, advice=_SAVE_AS_UTF8)
            return
        yield from _READERS[file.suffix.lower()](file, problems)
    except OSError as error:
        problems.add(where, f"cannot be read: {error.strerror or error}", rest_unread=True)
    except MemoryError:
        problems.add(where, "takes more memory than there is", rest_unread=True)


# What a file that has no rows begins with, what it is, and what to do about it.
_NO_ROWS = {
    b"version https://git-lfs": ("a Git LFS pointer", "a Git LFS pointer: `git lfs pull` fetches the file"),
    b"\x1f\x8b": ("what gzip compressed", "compressed with gzip: gunzip < OLD > NEW unpacks it"),
    b"PK\x03\x04": ("a ZIP archive", "a ZIP archive: unzip -p OLD > NEW unpacks it"),
    b"\x28\xb5\x2f\xfd": ("what zstd compressed", "compressed with zstd: unzstd < OLD > NEW unpacks it"),
    b"\xfd7zXZ\0": ("what xz compressed", "compressed with xz: unxz < OLD > NEW unpacks it"),
}
_SAVE_AS_UTF8 = "UTF-16 and UTF-32 can be converted: iconv -f UTF-16 -t UTF-8 OLD > NEW"


def _wide_encoding(start: bytes) -> str:
    """UTF-16 or UTF-32 where four bytes begin as those do, with a mark or with ASCII letters between NULs; else ""."""
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "UTF-32"
    marked = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    nul = [byte == 0 for byte in start]
    return "UTF-16" if marked or nul in ([False, True] * 2, [True, False] * 2) else ""


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
        # In bytes: a line ends at \n only, not at U+2028.
        for number, line in enumerate(iter(lambda: file.readline(_MOST_BYTES + 1), b""), 1):
            where = f"{path}:{number}"
            if len(line) > _MOST_BYTES:
                size = len(line)
                while not line.endswith(b"\n") and (line := file.readline(_MOST_BYTES)):
                    size += len(line)
                problems.add(where, f"{_TOO_LARGE}{size / 2**20:.1f} MiB")
                continue
            try:
                text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
                if text.startswith("\ufeff"):
                    raise _Refused(
                        "not JSON: expected a row; got a byte order mark inside the file, as if two were joined"
                    )
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

    def bad_end(expected: str, position: int) -> None:
        at = text.count("\n", 0, position) + 1
        got = repr(text[position : position + 20]) if position < len(text) else "the end of the file"
        problems.add(f"{path}:{at}", f"not JSON: expected {expected}; got {got}", rest_unread=True)

    position, line, counted = skip(text.index("[") + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        begin, where = position, f"{path}:{line}"
        try:
            row, position = _DECODER.raw_decode(text, position)
            if position - begin > _MOST_BYTES:
                problems.add(where, f"{_TOO_LARGE}{(position - begin) / 2**20:.1f} MiB")
            else:
                yield where, row
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                where = f"{path}:{error.lineno}"
            end = _end_of_row(text, position)
            problems.add(where, _unreadable(error), rest_unread=end is None)
            if end is None:
                return
            position = end
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            return bad_end("',' or ']' after a row", position)
    if (position := skip(position + 1)) < len(text):
        bad_end("nothing after the list", position)


def _end_of_row(text: str, position: int) -> int | None:
    """Where an object or list that can't be decoded ends, by its brackets; None where it has no end."""
    if text[position : position + 1] not in ("{", "["):
        return None
    depth = 0
    for token in _BRACKETS.finditer(text, position):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token.group()[0], 0)
        if depth == 0:
            return token.end()
    return None


# A string is passed over whole, also one without an end, which would be tried from each of its letters and quotes.
_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


def _csv_rows(path: Path, problems: Problems) -> Iterator[Row]:
    text = _text(path, problems)
    if text is None:
        return
    csv.field_size_limit(2**31 - 1)  # 128 KiB by default, less than a long document
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        where = f"{path}:{line}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # a quote without its end may have taken in rows after its own
            problems.add(where, f"not CSV: {error}", rest_unread=reader.line_num > line)
            continue
        size = sum(map(len, cells))
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) < len(header):
                named = ", ".join(header)
                problems.add(where, f"expected different column names; got {named[:200]}", rest_unread=True)
                return
        elif size > _MOST_BYTES:
            problems.add(where, f"{_TOO_LARGE}{size / 2**20:.1f} MiB")
        elif len(cells) != len(header):
            problems.add(where, f"expected {len(header)} cells, as in the header; got {len(cells)}")
        else:
            yield where, dict(zip(header, cells, strict=True))


def _parquet_rows(path: Path, problems: Problems) -> Iterator[Row]:
    import pyarrow  # what `datasets` reads Parquet with
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for row in (batch.slice(at, 1) for at in range(batch.num_rows)):
                    where = f"{path}:{number + 1}"
                    if row.nbytes > _MOST_BYTES:
                        problems.add(where, f"{_TOO_LARGE}{row.nbytes / 2**20:.1f} MiB")
                    else:
                        yield where, row.to_pylist()[0]
                    number += 1
    # ValueError: text that is not UTF-8; OverflowError: a date beyond Python's.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        problems.add(f"{path}:{number + 1}", f"not readable as Parquet: {error}", rest_unread=True)


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
        problems.add(f"{path}:{line}", _unreadable(error), rest_unread=True)
        return None


def _hub_rows(spec: DatasetConfig, problems: Problems) -> Iterator[Row]:
    """Rows of a dataset on the Hub, if `path` can be the name of one; else the error for a missing file."""
    path = Path(spec.path)
    if path.expanduser().is_symlink():
        raise DataError(f"{spec.path}: a symbolic link to what is not there")
    missing = f"{spec.path}: no such file or directory{_nearest(path.expanduser())}"
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", spec.path) or path.suffix.lower() in _READERS:
        raise DataError(missing)

    import datasets  # a second to import, and not needed for local files
    from datasets.exceptions import DatasetsError

    # RuntimeError: a dataset that is a script; ImportError: one whose images or sounds need a package.
    expected = (OSError, ValueError, RuntimeError, ImportError, DatasetsError)
    try:
        table = datasets.load_dataset(spec.path, spec.name, split=spec.split)
    except expected as error:
        raise DataError(f"{missing}\n  and as a dataset on the Hub: {error}") from error

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for number, row in enumerate(table, 1):
                yield f"{spec.path}:{number}", row
        except expected as error:
            problems.add(f"{spec.path}:{number + 1}", f"cannot be read: {error}", rest_unread=True)

    return rows()


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
_PARQUET_ROWS = 1024  # decoded at once


class _Refused(ValueError):
    """JSON that Python would read, but not as it was meant."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        [(twice, times)] = Counter(name for name, _ in pairs).most_common(1)
        raise _Refused(f"`{twice}`: expected each key once; got it {times} times")
    return row


def _constant(name: str) -> float:
    raise _Refused(f"not JSON: expected a value; got {name}")


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python reads 4,300 digits and no more, as the time grows with their square
        raise _Refused(f"not JSON: expected a number; got one of {len(digits):,} digits") from None


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)


def _unreadable(error: Exception) -> str:
    match error:
        case _Refused():
            return str(error)
        case json.JSONDecodeError():
            return f"not JSON: {error.msg} at column {error.colno}"
        case RecursionError():
            return "not JSON: nested too deep to be a row"
        case UnicodeDecodeError():
            return f"not UTF-8: byte {error.object[error.start]:#04x} ({error.reason})"
        case _:
            return f"not JSON: {error}"
