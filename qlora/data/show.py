"""What `qlora data RECIPE` prints: what was read, what of it is learned, and what should be mended before training."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora.data.chat import Example, Tokenized
from qlora.data.packing import batches
from qlora.data.source import Rows, text_fingerprint
from qlora.model.batch import IGNORE_INDEX
from qlora.redact import redact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BAR = 40  # columns of the longest bar in the histogram
_LISTED = 5  # rows named where a list may be long
_EXCERPT = 600  # characters shown of a stretch that is not learned, and a third of what is shown of one that is


@dataclass(frozen=True, slots=True)
class Split:
    """The rows of one side, and what became of them."""

    rows: Rows
    tokenized: Tokenized


def show(
    train: Split,
    held_out: Split,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    per_device_train_batch_size: int,
    packing: bool,
    samples: int = 3,
    console: Console | None = None,
) -> None:
    """Print all that is known of the data, but for secrets in its paths and its rows: what is printed is shared.

    samples  rows that are printed as they are trained on: green is learned, dim is not. Where colour can't be seen,
             what is learned stands in brackets
    """
    console = console or Console()
    _datasets(console, train, held_out)
    _lengths(console, train.tokenized.examples, max_seq_length)
    _batches(console, train.tokenized.examples, max_seq_length, per_device_train_batch_size, packing)
    _warnings(console, train, held_out)
    _samples(console, train.tokenized.examples[:samples], tokenizer)


def duplicates(train: Rows, held_out: Rows) -> list[tuple[str, str]]:
    """Held-out rows whose text, but for case and white space, is trained on: (held-out row, training row)."""
    trained = {text_fingerprint(row): row.where for row in reversed(train.conversations)}
    pairs = ((row.where, trained.get(text_fingerprint(row))) for row in held_out.conversations)
    return list(dict.fromkeys((held, where) for held, where in pairs if where is not None))


def histogram(lengths: Sequence[int], bins: int = 10) -> list[tuple[int, int, int]]:
    """(shortest, longest, count) of bins of one round width that hold all lengths."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = next(width for width in _round_widths() if high // width - low // width < bins)
    counts = [0] * (high // width - low // width + 1)
    for length in lengths:
        counts[length // width - low // width] += 1
    first = low // width * width
    return [(first + width * at, first + width * (at + 1) - 1, count) for at, count in enumerate(counts)]


def _round_widths() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    scale = 1
    while True:
        yield from (scale, 2 * scale, 5 * scale)
        scale *= 10


def _datasets(console: Console, train: Split, held_out: Split) -> None:
    table = Table("dataset", "format", title="Data", title_justify="left", box=None, pad_edge=False)
    for name in ("rows", "used"):
        table.add_column(name, justify="right")
    table.add_column("not read", overflow="fold")
    for side, split in (("train", train), ("held out", held_out)):
        for data in split.rows.datasets:
            found = f"{data.format} ({'detected' if data.detected else 'as set'})"
            weight = f" (x{data.weight:g})" if data.weight != 1 else ""
            used = f"{data.used:,}{weight if side == 'train' else ''}"
            cells = (redact(f"{data.path} [{side}]"), found, f"{data.rows:,}", used, redact(", ".join(data.unused)))
            table.add_row(*map(Text, cells))
    console.print(table)
    for side, split in (("train", train), ("held out", held_out)):
        examples = split.tokenized.examples
        tokens = sum(len(example.input_ids) for example in examples)
        learned = sum(example.supervised for example in examples)
        share = f" ({learned / tokens:.1%})" if tokens else ""
        line = f"{side}: {len(examples):,} examples, {tokens:,} tokens, {learned:,} supervised{share}"
        console.print(Text(line), highlight=False)


def _lengths(console: Console, examples: list[Example], max_seq_length: int) -> None:
    lengths = [len(example.input_ids) for example in examples]
    if not lengths:
        return
    console.print(Text("\nTokens an example (train)"))
    bars = histogram(lengths)
    most = max(count for _, _, count in bars)
    block = "#" if console.options.ascii_only else "█"
    for shortest, longest, count in bars:
        size = max(1, round(_BAR * count / most)) if count else 0
        console.print(Text(f"{shortest:>7,} - {longest:<7,} {block * size} {count:,}"))
    cut = sum(example.truncated for example in examples)
    line = f"truncated at max_seq_length {max_seq_length:,}: {cut:,} of {len(examples):,} ({cut / len(examples):.1%})"
    console.print(Text(line, style="yellow" if cut else ""))


def _batches(console: Console, examples: list[Example], max_seq_length: int, size: int, packing: bool) -> None:
    """How full micro-batches are, and how full they would be the other way."""
    if not examples:
        return
    packed, padded = (
        batches(
            examples,
            max_seq_length=max_seq_length,
            per_device_train_batch_size=size,
            pad_token_id=0,
            packing=pack,
            seed=0,
        )
        for pack in (True, False)
    )
    lines = {
        True: f"packed: {len(packed):,} micro-batches of at most {packed.capacity:,} tokens, {packed.fill:.1%} full",
        False: f"padded: {len(padded):,} micro-batches of {size}, {padded.fill:.1%} of their places hold tokens",
    }
    console.print(Text(f"\n{lines[packing]}\n  (the other way, {lines[not packing]})"))


def _warnings(console: Console, train: Split, held_out: Split) -> None:
    """What is likely to be a mistake in the data. Each list is counted whole and named in part."""
    for side, split in (("train", train), ("held out", held_out)):
        _list(console, f"{side}: rows with nothing to learn, left out", split.tokenized.nothing_to_learn)
        _list(
            console,
            f"{side}: rows in which the chat template renders earlier turns otherwise than when they were the last "
            "(a reasoning model's thoughts, for one, are taken away)",
            split.tokenized.rewritten,
        )
    if held_out.rows.conversations:
        found = [f"{held} = {where}" for held, where in duplicates(train.rows, held_out.rows)]
        _list(console, "held-out rows that are trained on", found)
        if not found:
            console.print(Text("no held-out row is trained on"))


def _list(console: Console, title: str, items: list[str]) -> None:
    if not items:
        return
    console.print(Text(f"\n{len(items):,} {title}", style="yellow"), soft_wrap=True)
    for item in items[:_LISTED]:
        console.print(Text(f"  {redact(item)}"), soft_wrap=True)
    if len(items) > _LISTED:
        console.print(Text(f"  ... and {len(items) - _LISTED:,} more"))


def _samples(console: Console, examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    if not examples:
        return
    coloured = console.is_terminal and not console.no_color
    opening, closing = ("[[", "]]") if console.options.ascii_only else ("⟦", "⟧")
    legend = Text("\nRows as they are trained on: ")
    legend.append("learned" if coloured else f"{opening}learned{closing}", style="green")
    legend.append(", not learned", style="dim")
    console.print(legend)
    for example in examples:
        console.print(Text(f"\n{redact(example.where)}", style="bold"))
        row = Text()
        for learned, text in stretches(example, tokenizer):
            # Whole, as of half a secret nobody can tell that it is one.
            shown = _printable(_excerpt(redact(text), 3 * _EXCERPT if learned else _EXCERPT), console.encoding)
            marked = f"{opening}{shown}{closing}" if learned and not coloured else shown
            row.append(marked, style="green" if learned else "dim")
        console.print(row, soft_wrap=True)


def stretches(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[bool, str]]:
    """The example's text, cut where it begins or ceases to be learned: (is learned, text)."""
    before, end = "", 0
    for learned, group in groupby(example.labels, key=lambda label: label != IGNORE_INDEX):
        end += len(list(group))
        # Decoded from the front, as a token alone may be half a character, or lose the space before a word.
        text = cast(str, tokenizer.decode(example.input_ids[:end], clean_up_tokenization_spaces=False))
        yield learned, text[len(before) :]
        before = text


def _excerpt(text: str, most: int) -> str:
    """The text, or its two ends where it is long."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... ({len(text) - 2 * half:,} characters) ... {text[-half:]}"


def _printable(text: str, encoding: str) -> str:
    """The text with control characters, and what the terminal can't encode, as escapes: data must not steer it."""
    shown = (repr(char)[1:-1] if unicodedata.category(char) == "Cc" and char not in "\n\t" else char for char in text)
    return "".join(shown).encode(encoding, "backslashreplace").decode(encoding)
