"""The rows of a task in recipes/data, as their tests read them, and how two texts are compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

DATA = Path(__file__).resolve().parents[1] / "recipes" / "data"


@dataclass(frozen=True, slots=True)
class Row:
    """Where it stands, its messages as parsed, the text that is asked and what is to be answered."""

    where: str
    messages: list[dict[str, str]]

    @property
    def text(self) -> str:
        return self.messages[1]["content"]

    @property
    def written(self) -> str:
        return self.messages[2]["content"]


R = TypeVar("R", bound=Row)


def read(name: str, kind: type[R]) -> list[R]:
    lines = (DATA / name).read_text(encoding="utf-8").split("\n")
    assert lines.pop() == "", f"{name} does not end with a newline"
    return [kind(f"{name}:{number}", json.loads(line)["messages"]) for number, line in enumerate(lines, 1)]


def words(text: str) -> list[str]:
    """`text` as lower-case words without punctuation: what two texts are compared by."""
    return re.findall(r"\w+", text.casefold())


def ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    found = words(text)
    return (tuple(found[i : i + n]) for i in range(len(found) - n + 1))


def sentences(text: str) -> set[str]:
    """The sentences of a masked text that have three words or more."""
    found = (" ".join(words(sentence)) for sentence in re.split(r"[.!?]", text))
    return {sentence for sentence in found if len(sentence.split()) >= 3}
