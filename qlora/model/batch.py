"""A micro-batch: what travels through the step together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

IGNORE_INDEX = -100  # transformers' and torch's mark for "no loss here"


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids, their places, and which of them are to be learned.

    input_ids       int64 [B, T]
    position_ids    int64 [B, T]   restarts at 0 with each document
    labels          int64 [B, T]   unshifted: labels[b, t] is input_ids[b, t] where that token is to be predicted
                                   (from the ones before it), else IGNORE_INDEX; so is each document's first token
    attention_mask  int64 [B, T]   1 for tokens, 0 for right padding; None where nothing is padded
    rows            where each document came from, as "file:line"
    documents       lengths of the documents in each row, with the padding; read off position_ids if not given

    A packed micro-batch is [1, T], holds several documents and has no attention mask: transformers reads the borders
    from the restarting position ids and keeps documents from seeing each other.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None = None
    rows: tuple[str, ...] = ()
    documents: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.documents:
            # Once, where the batch is made: read later, it would make the host wait for the device.
            object.__setattr__(self, "documents", _documents(self.position_ids, self.attention_mask is not None))

    @property
    def tokens(self) -> int:
        """Tokens of documents; padding does not count."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    @property
    def supervised(self) -> int:
        """Tokens that carry loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same micro-batch with its tensors on `device`."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            labels=self.labels.to(device),
            attention_mask=mask,
        )

    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which positions predict a supervised token, and what it is.

        returns positions int64 [N], into the flattened [B*T] hidden states, and targets int64 [N]
        """
        following = torch.full_like(self.labels, IGNORE_INDEX)
        following[:, :-1] = self.labels[:, 1:]
        following = following.flatten()
        positions = (following != IGNORE_INDEX).nonzero().flatten()
        return positions, following[positions]


def regroup(batches: Sequence[Batch], most_tokens: int) -> list[Batch]:
    """Cut a step's rows anew, into micro-batches of at most `most_tokens` tokens, or of one row.

    A step is a sum over its rows, so where they are cut is free: fewer and larger matrix products are faster, and more
    and smaller ones take less memory. The rows stay in their order. Neighbours of one length share a micro-batch;
    those that came padded are split, and share none with others.

    most_tokens  0: nothing is changed
    """
    if not most_tokens:
        return list(batches)
    groups: list[list[Batch]] = []
    for piece in (piece for batch in batches for piece in _pieces(batch, most_tokens)):
        group = groups[-1] if groups else []
        width = piece.input_ids.shape[1]
        alike = all(each.attention_mask is None and each.input_ids.shape[1] == width for each in (*group, piece))
        if group and alike and sum(each.input_ids.numel() for each in (*group, piece)) <= most_tokens:
            group.append(piece)
            continue
        groups.append([piece])
    return [group[0] if len(group) == 1 else _concatenated(group) for group in groups]


def halved(batches: Sequence[Batch]) -> list[Batch]:
    """Each micro-batch in two: by its rows, or one row at the border of two documents. A single document stays."""
    return [half for batch in batches for half in _halves(batch)]


def divisible(batches: Sequence[Batch]) -> bool:
    """Whether `halved` would change anything."""
    return any(sum(map(len, batch.documents)) > 1 for batch in batches)


def _halves(batch: Batch) -> list[Batch]:
    rows = batch.input_ids.shape[0]
    if rows > 1:
        return [_of_rows(batch, 0, rows // 2), _of_rows(batch, rows // 2, rows)]
    lengths = batch.documents[0]
    if len(lengths) < 2:
        return [batch]
    borders = list(accumulate(lengths))[:-1]
    at = min(range(len(borders)), key=lambda i: abs(2 * borders[i] - sum(lengths)))
    return [_of_documents(batch, 0, at + 1), _of_documents(batch, at + 1, len(lengths))]


def _of_documents(batch: Batch, start: int, end: int) -> Batch:
    """Some documents of a packed row."""
    lengths = batch.documents[0]
    where = slice(sum(lengths[:start]), sum(lengths[:end]))
    return Batch(
        batch.input_ids[:, where],
        batch.position_ids[:, where],
        batch.labels[:, where],
        None,
        batch.rows[start:end],
        (lengths[start:end],),
    )


def _pieces(batch: Batch, most_tokens: int) -> list[Batch]:
    """The micro-batch, by rows where it holds too many tokens; one row each where they may still be joined."""
    rows, width = batch.input_ids.shape
    if rows * width <= most_tokens:
        return [batch]
    size = 1 if batch.attention_mask is None else max(most_tokens // width, 1)
    return [_of_rows(batch, start, min(start + size, rows)) for start in range(0, rows, size)]


def _of_rows(batch: Batch, start: int, end: int) -> Batch:
    documents = batch.documents[start:end]
    before = sum(map(len, batch.documents[:start]))
    return Batch(
        batch.input_ids[start:end],
        batch.position_ids[start:end],
        batch.labels[start:end],
        None if batch.attention_mask is None else batch.attention_mask[start:end],
        batch.rows[before : before + sum(map(len, documents))],
        documents,
    )


def _concatenated(group: Sequence[Batch]) -> Batch:
    return Batch(
        torch.cat([batch.input_ids for batch in group]),
        torch.cat([batch.position_ids for batch in group]),
        torch.cat([batch.labels for batch in group]),
        None,
        tuple(row for batch in group for row in batch.rows),
        tuple(lengths for batch in group for lengths in batch.documents),
    )


def _documents(position_ids: torch.Tensor, padded: bool) -> tuple[tuple[int, ...], ...]:
    rows, tokens = position_ids.shape
    if padded:
        return ((tokens,),) * rows
    borders = (position_ids.diff(dim=1) != 1).nonzero().tolist()
    starts: list[list[int]] = [[0] for _ in range(rows)]
    for row, before in borders:
        starts[row].append(before + 1)
    return tuple(tuple(b - a for a, b in pairwise([*each, tokens])) for each in starts)


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out conversation up to its last answer.

    ids       the prompt's tokens, those that open the answer included
    prompt    what was said last before the answer, for people
    expected  the answer in the data
    """

    ids: tuple[int, ...]
    prompt: str
    expected: str
