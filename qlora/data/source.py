"""Reads datasets, whatever their layout, as conversations, and says all that is wrong with them, with file and line.

    messages            {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    sharegpt            {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    alpaca              {"instruction": "...", "input": "...", "output": "..."}
    prompt-completion   {"prompt": "...", "completion": "..."}
    text                {"text": "..."}, or a .txt file, which is one document

from .jsonl, .ndjson, .json (a list, or one row a line), .csv, .tsv, .parquet and .txt files, from directories of those,
and from the Hub. The format is recognised by the fields of the rows.

Local files are read here and not through `datasets`: its readers guess types (a CSV cell "null" becomes nothing, "42" a
number), take file names for glob patterns, write a second copy into a cache, and can't tell which line was wrong.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import io
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.config import DataConfig, DatasetConfig
from qlora.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}
# Strings beside the content that chat templates read; whatever else a turn carries is reported as unused.
TURN_FIELDS = ("name", "tool_call_id", "reasoning_content")
TURN_LISTS = ("messages", "conversations")


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a dataset.

    messages  turns with "role" and "content", the last one the assistant's; empty where the format is "text"
    text      the document where the format is "text"
    where     "file:line"; the row's number in place of the line for Parquet and the Hub
    format    the layout it came in: "prompt-completion" and "alpaca" can be trained without a chat template
    """

    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""
    where: str = ""
    format: str = "messages"


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What was found at one entry of the recipe.

    detected  whether the format was recognised by its fields (else the recipe named it)
    rows      rows in the files
    used      rows of an epoch, after the held-out rows are taken away and `weight` is applied
    unused    fields that some rows have and nothing reads
    """

    path: str
    format: str
    detected: bool
    rows: int
    used: int
    weight: float = 1.0
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rows:
    """Conversations in the order of the recipe, and where they came from."""

    conversations: list[Conversation] = field(default_factory=list)
    datasets: list[DatasetInfo] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every turn in order: equal for equal data, wherever the files lie."""
        digest = hashlib.sha256()
        for conversation in self.conversations:
            digest.update(json.dumps([conversation.messages, conversation.text], sort_keys=True).encode())
        return digest.hexdigest()


class Problems:
    """What is wrong with some rows, collected so that a person is told once and not once a run."""

    shown = 20  # a file of the wrong shape is wrong in every row; twenty lines are enough to see that

    def __init__(self) -> None:
        self.count = 0
        self.lines: list[str] = []

    def add(self, where: str, what: str) -> None:
        self.count += 1
        if len(self.lines) < self.shown:
            self.lines.append(f"  {where}: {what}")

    def check(self, where: str) -> None:
        """Raise DataError with all that was collected, if anything was. `where` ends its title: "3 problems in ..."."""
        if self.count:
            more = self.count - len(self.lines)
            rest = [f"  ... and {more} more"] if more else []
            title = f"{self.count} problem{'s' if self.count > 1 else ''} {where}"
            raise DataError("\n".join([title, *self.lines, *rest]))


def read(specs: Sequence[DatasetConfig], *, seed: int = 0) -> Rows:
    """All rows of `specs`, each dataset repeated or sampled by its weight (the same sample for the same seed).

    Raises DataError for a missing file, an unknown format, and once for all bad rows.
    """
    return read_splits(DataConfig(datasets=list(specs)), seed=seed)[0]


def read_splits(data: DataConfig, *, seed: int = 0) -> tuple[Rows, Rows]:
    """Training rows and held-out rows.

    Held out are all rows of `eval_datasets`, or `eval_fraction` of the training rows, chosen by the seed and each row's
    text: rows of equal text fall on the same side, and a row stays on its side when the file is put in another order.

    Raises DataError for a missing file, an unknown format, and once for all bad rows.
    """
    problems = Problems()
    loaded = [_load(spec, problems) for spec in data.datasets]
    loaded_eval = [_load(spec, problems) for spec in data.eval_datasets]
    problems.check("in the data")

    held = _held_out([row for each in loaded for row in each.conversations], data.eval_fraction, seed)
    train, held_out = Rows(), Rows()
    for number, each in enumerate(loaded):
        kept = [row for row in each.conversations if id(row) not in held]
        _append(train, each, _weighted(kept, each.spec.weight, random.Random(f"{seed}-{number}")))
        if held:
            _append(held_out, each, [row for row in each.conversations if id(row) in held])
    for each in loaded_eval:
        _append(held_out, each, each.conversations)
    if not train.conversations:
        raise DataError("no rows to train on: every dataset's `weight` leaves none")
    return train, held_out


def text_fingerprint(conversation: Conversation) -> str:
    """Hash of what a conversation says, blind to letter case, white space and Unicode spelling."""
    text = "\n".join([conversation.text, *(turn["content"] for turn in conversation.messages)])
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(normal.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One dataset, before rows are held out and weighted."""

    spec: DatasetConfig
    format: str
    unused: tuple[str, ...]
    conversations: list[Conversation]


def _append(rows: Rows, data: _Loaded, used: list[Conversation]) -> None:
    rows.conversations.extend(used)
    rows.datasets.append(
        DatasetInfo(
            path=data.spec.path,
            format=data.format,
            detected=data.spec.format == "auto",
            rows=len(data.conversations),
            used=len(used),
            weight=data.spec.weight,
            unused=data.unused,
        )
    )


def _weighted(rows: list[Conversation], weight: float, rng: random.Random) -> list[Conversation]:
    """Weight 2.5: every row twice, and a sampled half of them a third time."""
    whole, part = divmod(weight, 1)
    sampled = sorted(rng.sample(range(len(rows)), round(part * len(rows))))
    return rows * int(whole) + [rows[index] for index in sampled]


def _held_out(rows: list[Conversation], fraction: float, seed: int) -> set[int]:
    """ids of the rows that are held out: at least one where fraction > 0, and never all."""
    if fraction <= 0:
        return set()
    same: dict[str, list[Conversation]] = {}
    for row in rows:
        same.setdefault(text_fingerprint(row), []).append(row)
    if len(same) < 2:
        raise DataError("data.eval_fraction needs at least two different rows: one to train on, one to hold out")
    drawn = sorted(same, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())
    wanted, held = max(1, round(fraction * len(rows))), set[int]()
    for text in drawn[:-1]:
        if len(held) >= wanted:
            break
        held.update(id(row) for row in same[text])
    return held


# --- rows: where they lie ---------------------------------------------------------------------------------------------

_Row = tuple[str, Any]  # "file:line", and the row as it was written


def _load(spec: DatasetConfig, problems: Problems) -> _Loaded:
    before = problems.count
    rows = list(_rows(spec, problems))
    if not rows and problems.count == before:
        raise DataError(f"{spec.path}: no rows")
    layout = next(filter(None, (detect(row) for _, row in rows)), None) if spec.format == "auto" else spec.format
    if layout is None and rows:
        where, row = rows[0]
        has = f"the fields {', '.join(map(repr, row))}" if isinstance(row, dict) and row else _got(row)
        raise DataError(
            f"{where}: no known format: the row has {has}\n"
            "  a row has `messages`, `conversations`, `instruction` and `output`, `prompt` and `completion`, or `text`"
        )
    unused: dict[str, None] = {}
    read = (_conversation(where, row, layout or "", problems, unused) for where, row in rows)
    conversations = [conversation for conversation in read if conversation is not None]
    return _Loaded(spec, layout or "", tuple(unused), conversations)


def _rows(spec: DatasetConfig, problems: Problems) -> Iterator[_Row]:
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


def _json_rows(path: Path, problems: Problems) -> Iterator[_Row]:
    """A JSON list, or an object a line: told apart by the first character, as either comes under either suffix."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith(b"["):
            file.seek(0)
            yield from _json_list(path, file.read(), problems)
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


def _json_list(path: Path, content: bytes, problems: Problems) -> Iterator[_Row]:
    """The rows of a JSON list, decoded one by one so that each has its line."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.add(f"{path}:{_line(content, error.start)}", _unreadable(error))
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


def _line(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1


def _csv_rows(path: Path, problems: Problems) -> Iterator[_Row]:
    content = path.read_bytes()
    try:
        text = io.StringIO(content.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        problems.add(f"{path}:{_line(content, error.start)}", _unreadable(error))
        return
    csv.field_size_limit(2**31 - 1)  # 128 KiB by default, less than a long document
    reader = csv.reader(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
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


def _parquet_rows(path: Path, problems: Problems) -> Iterator[_Row]:
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


def _text_rows(path: Path, problems: Problems) -> Iterator[_Row]:
    content = path.read_bytes()
    try:
        yield f"{path}:1", {"text": content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        problems.add(f"{path}:{_line(content, error.start)}", _unreadable(error))


def _hub_rows(spec: DatasetConfig) -> Iterator[_Row]:
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


_READERS: dict[str, Callable[[Path, Problems], Iterator[_Row]]] = {
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


# --- conversations: what the rows mean --------------------------------------------------------------------------------


def detect(row: Any) -> str | None:
    """The format that has a row's fields, or None. Turns come first: many sets carry `prompt` or `text` beside them."""
    if not isinstance(row, dict):
        return None
    present = {key for key, value in row.items() if value is not None}
    for key in TURN_LISTS:
        if key in present:
            turns = [turn for turn in row[key] if isinstance(turn, dict)] if isinstance(row[key], list) else []
            keys = {name for turn in turns for name, value in turn.items() if value is not None}
            if keys & {"from", "value"}:
                return "sharegpt"
            return "messages" if key == "messages" or keys & {"role", "content"} else "sharegpt"
    for layout, fields in (("alpaca", {"instruction", "output"}), ("prompt-completion", {"prompt", "completion"})):
        if fields <= present:
            return layout
    return "text" if "text" in present else None


class _Check:
    """Reads the fields of one row; what is not as expected goes to `problems`."""

    def __init__(self, where: str, problems: Problems) -> None:
        self.where, self.problems, self.good = where, problems, True

    def fail(self, field: str, expected: str, got: str) -> None:
        self.good = False
        self.problems.add(self.where, f"`{field}`: expected {expected}; got {got}")

    def text(self, value: Any, field: str, *, empty: bool = False) -> str:
        if not isinstance(value, str):
            self.fail(field, "text", _got(value))
            return ""
        if not empty and not value.strip():
            self.fail(field, "text", "only white space" if value else "empty text")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # "\ud83d" alone is legal JSON, and tokenizers panic on it
            self.fail(field, "Unicode text", f"half a surrogate pair at character {error.start}")
        return value

    def content(self, value: Any, field: str) -> str:
        """A turn's text: a string, or OpenAI's list of parts."""
        if not isinstance(value, list):
            return self.text(value, field)
        parts: list[str] = []
        for number, part in enumerate(value):
            if isinstance(part, dict) and part.get("type") == "text":
                parts.append(self.text(part.get("text"), f"{field}[{number}].text", empty=True))
            else:
                kind = part.get("type") if isinstance(part, dict) else part
                self.fail(f"{field}[{number}]", 'a part of type "text"', _got(kind))
        return self.text("".join(parts), field) if self.good else ""


def _conversation(
    where: str, row: Any, layout: str, problems: Problems, unused: dict[str, None]
) -> Conversation | None:
    """The row as a conversation, or None after telling `problems` why not."""
    check = _Check(where, problems)
    if not isinstance(row, dict):
        problems.add(where, f"expected an object; got {_got(row)}")
        return None
    messages: list[dict[str, str]] = []
    text = ""
    if layout in ("messages", "sharegpt"):
        used = {next((key for key in TURN_LISTS if row.get(key) is not None), TURN_LISTS[layout == "sharegpt"])}
        if row.get("tools"):  # left out in silence, the model would learn calls of tools that it was never shown
            check.fail("tools", "no tools, which can't be rendered yet", _got(row["tools"]))
        key = next(iter(used))
        messages = _turns(row.get(key), key, layout, check, unused)
    elif layout == "alpaca":
        used = {"instruction", "input", "output"}
        asked = check.text(row.get("instruction"), "instruction")
        given = check.text(row.get("input") or "", "input", empty=True)
        messages = _pair(f"{asked}\n\n{given}" if given.strip() else asked, check.text(row.get("output"), "output"))
    elif layout == "prompt-completion":
        used = {"prompt", "completion"}
        messages = _pair(check.text(row.get("prompt"), "prompt"), check.text(row.get("completion"), "completion"))
    else:
        used = {"text"}
        text = check.text(row.get("text"), "text")
    unused.update(dict.fromkeys(str(key) for key, value in row.items() if key not in used and value is not None))
    return Conversation(messages=messages, text=text, where=where, format=layout) if check.good else None


def _pair(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _turns(turns: Any, key: str, layout: str, check: _Check, unused: dict[str, None]) -> list[dict[str, str]]:
    if not isinstance(turns, list):
        check.fail(key, "a list of turns", _got(turns))
        return []
    role_key, content_key = ("from", "value") if layout == "sharegpt" else ("role", "content")
    roles = SHAREGPT_ROLES if layout == "sharegpt" else {role: role for role in ROLES}
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(turns):
        at = f"{key}[{number}]"
        if not isinstance(turn, dict):
            check.fail(at, "a turn", _got(turn))
            continue
        present = {name: value for name, value in turn.items() if value is not None}
        role = present.get(role_key)
        known = roles.get(role) if isinstance(role, str) else None
        if known is None:
            check.fail(f"{at}.{role_key}", f"one of {', '.join(roles)}", _got(role))
        refused = [name for name in ("tool_calls", "function_call") if present.get(name)]
        for name in refused:
            check.fail(f"{at}.{name}", f"the call written out in `{content_key}`", _got(present[name]))
        if present.get("weight", 1) != 1:
            check.fail(f"{at}.weight", "1, as every assistant turn is learned", _got(present["weight"]))
        message = {"role": known or ""}
        message["content"] = "" if refused else check.content(present.get(content_key), f"{at}.{content_key}")
        for name in TURN_FIELDS:
            if name in present:
                message[name] = check.text(present[name], f"{at}.{name}")
        messages.append(message)
        read = {role_key, content_key, "weight", *refused, *TURN_FIELDS}
        unused.update(dict.fromkeys(f"{key}[].{name}" for name in present if name not in read))
    if check.good:
        said = [message["role"] for message in messages]
        if "assistant" not in said:
            check.fail(key, "a turn by the assistant", " and ".join(dict.fromkeys(said)) + " only" if said else "none")
        elif said[-1] != "assistant":
            check.fail(key, "the last turn by the assistant", f"{said[-1]}'s")
    return messages


def _got(value: Any) -> str:
    """A value for an error line: its kind, and what it is if that is short."""
    kinds: Iterable[tuple[type | tuple[type, ...], str]] = (
        (bool, "a boolean"),
        ((int, float), "a number"),
        (list, "a list"),
        (dict, "an object"),
    )
    if value is None:
        return "nothing"
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    if isinstance(value, str):
        return shown
    return next((f"{name}, {shown}" for kind, name in kinds if isinstance(value, kind)), shown)
