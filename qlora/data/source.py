"""A recipe's datasets as conversations, training rows apart from held-out rows, or all that is wrong with them at once.

    spec -- files --> rows -- formats --> conversations -- eval_fraction, weight --> training rows, held-out rows

`files` knows where rows lie, `formats` what they mean.
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from qlora.config import DataConfig, DatasetConfig
from qlora.data import files, formats
from qlora.data.formats import Conversation
from qlora.data.problems import Problems
from qlora.errors import DataError

_MOST_ROWS = 100_000_000  # an epoch's order is drawn in memory


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


def read(specs: Sequence[DatasetConfig], *, seed: int = 0) -> Rows:
    """All rows of `specs`, each dataset repeated or sampled by its weight (the same sample for the same seed).

    Raises DataError for a missing file, and once for all that is wrong in files and rows.
    """
    return read_splits(DataConfig(datasets=list(specs)), seed=seed)[0]


def read_splits(data: DataConfig, *, seed: int = 0, problems: Problems | None = None) -> tuple[Rows, Rows]:
    """Training rows and held-out rows.

    Held out are all rows of `eval_datasets`, or `eval_fraction` of the training rows, chosen by the seed and each row's
    text: rows of equal text fall on the same side, and a row stays on its side when the file is put in another order.

    What is wrong goes to `problems`, for the caller to check; where there are none given, it is raised here, at once.
    With data.skip_bad_rows, rows that are wrong are left out.

    Raises DataError for a missing file, and where there is nothing to train on or to hold out.
    """
    caller_checks = problems is not None
    problems = Problems(data.skip_bad_rows) if problems is None else problems
    loaded = [_load(spec, problems) for spec in data.datasets]
    loaded_eval = [_load(spec, problems) for spec in data.eval_datasets]
    left = any(each.conversations for each in loaded)
    if not left or not caller_checks:
        problems.check(left=left)

    try:
        held = _held_out([row for each in loaded for row in each.conversations], data.eval_fraction, seed)
    except DataError:
        problems.check(left=left)  # they may be why
        raise
    train, held_out = Rows(), Rows()
    for number, each in enumerate(loaded):
        kept = [row for row in each.conversations if id(row) not in held]
        _append(train, each, _weighted(kept, each.spec.weight, random.Random(f"{seed}-{number}")))
        if held:
            _append(held_out, each, [row for row in each.conversations if id(row) in held])
    for each in loaded_eval:
        _append(held_out, each, each.conversations)
    if not train.conversations:
        problems.check(left=True)
        raise DataError("no rows to train on: every dataset's `weight` leaves none")
    return train, held_out


def without(rows: Rows, refused: Iterable[Conversation]) -> Rows:
    """The rows less those that turned out wrong after they were read, counted anew."""
    out, kept = {id(row) for row in refused}, Rows()
    start = 0
    for info in rows.datasets:
        used = [row for row in rows.conversations[start : start + info.used] if id(row) not in out]
        start += info.used
        kept.conversations.extend(used)
        kept.datasets.append(replace(info, used=len(used)))
    return kept


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


def _load(spec: DatasetConfig, problems: Problems) -> _Loaded:
    before = problems.count
    rows = list(files.read_rows(spec, problems))
    if not rows and problems.count == before:
        raise DataError(f"{spec.path}: no rows")
    layout = formats.recognise(rows, problems) if spec.format == "auto" else spec.format
    unused: dict[str, None] = {}
    read = (formats.conversation(where, row, layout, problems, unused) for where, row in rows)
    conversations = [conversation for conversation in read if conversation is not None] if layout else []
    if spec.weight * len(conversations) > _MOST_ROWS:
        raise DataError(f"{spec.path}: weight {spec.weight:g} makes more than {_MOST_ROWS:,} rows of it")
    return _Loaded(spec, layout, tuple(unused), conversations)


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
