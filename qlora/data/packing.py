"""Puts examples together into micro-batches.

An epoch is a plan of indices, made from the lengths alone; tensors are made when a micro-batch is asked for. The plan
follows from (seed, epoch), so that a run resumes from those two and the position in the plan.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch

from qlora.data.chat import Example
from qlora.model.batch import IGNORE_INDEX, Batch


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins: the longest first, each into the fullest bin that still has room for it.

    lengths   tokens of each item, none above `capacity`
    returns   for each bin the indices of its items

    At most 11/9 of the fewest bins possible, plus one (Johnson 1974). O(n log n) comparisons: bins are looked up by the
    room they have left, and of that there are at most `capacity` different values. Of items of equal length the first
    comes first. Lengths alone decide how many bins there are, not their order.

    Raises ValueError if an item is longer than a bin.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"an item of {max(lengths)} tokens does not fit a bin of {capacity}")
    bins: list[list[int]] = []
    rooms: list[int] = []  # what open bins have left, each value once, ascending
    with_room: dict[int, list[int]] = {}  # bins that have so much left
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect_left(rooms, lengths[index])
        if at == len(rooms):
            chosen, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        bins[chosen].append(index)
        left = room - lengths[index]
        if left:
            if left not in with_room:
                insort(rooms, left)
                with_room[left] = []
            with_room[left].append(chosen)
    return bins


@dataclass(frozen=True, slots=True)
class Batches(Sequence[Batch]):
    """The micro-batches of an epoch: `plan[i]` holds the indices of the examples in micro-batch i, made when asked for.

    capacity  tokens that a packed micro-batch may hold; None where examples are padded instead
    """

    examples: Sequence[Example]
    plan: list[list[int]]
    pad_token_id: int
    capacity: int | None

    def __len__(self) -> int:
        return len(self.plan)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Batches: ...
    def __getitem__(self, index: int | slice) -> Batch | Batches:
        if isinstance(index, slice):
            return replace(self, plan=self.plan[index])
        examples = [self.examples[number] for number in self.plan[index]]
        return _pad(examples, self.pad_token_id) if self.capacity is None else _pack(examples)

    @property
    def fill(self) -> float:
        """Share of the places that hold tokens: of all bins' capacity if packed, else of the padded rectangles."""
        sizes = [[len(self.examples[number].input_ids) for number in indices] for indices in self.plan]
        places = sum(self.capacity or len(lengths) * max(lengths) for lengths in sizes)
        return sum(map(sum, sizes)) / places if places else 0.0


def batches(
    examples: Sequence[Example],
    *,
    max_seq_length: int,
    per_device_train_batch_size: int,
    pad_token_id: int,
    packing: bool,
    seed: int | None,
    epoch: int = 0,
) -> Batches:
    """The micro-batches of one epoch, in an order drawn from (seed, epoch), or not shuffled if seed is None.

    With packing, a micro-batch is one row [1, T] with T up to max_seq_length * per_device_train_batch_size: the same
    tokens as that many full rows, but one large bin wastes less than several small ones. No example is longer than
    max_seq_length. Which examples of equal length share a bin is drawn anew each epoch; the number of bins is not,
    so every epoch has as many micro-batches.

    Without packing, per_device_train_batch_size examples are padded on the right to the longest of them; the last
    micro-batch of an epoch may hold fewer.

    Raises ValueError if an example is longer than max_seq_length.
    """
    lengths = [len(example.input_ids) for example in examples]
    if lengths and max(lengths) > max_seq_length:
        raise ValueError(f"an example of {max(lengths)} tokens is longer than max_seq_length {max_seq_length}")
    # A string, as random.Random(seed + epoch) would give epoch 1 of seed 0 the order of epoch 0 of seed 1.
    rng = None if seed is None else random.Random(f"{seed}-{epoch}")
    order = list(range(len(examples)))
    if rng:
        rng.shuffle(order)
    if not packing:
        size = per_device_train_batch_size
        return Batches(examples, [order[at : at + size] for at in range(0, len(order), size)], pad_token_id, None)
    capacity = max_seq_length * per_device_train_batch_size
    bins = best_fit_decreasing([lengths[index] for index in order], capacity)
    plan = [[order[place] for place in places] for places in bins]
    if rng:
        rng.shuffle(plan)  # bins come out with the long examples first
    return Batches(examples, plan, pad_token_id, capacity)


def _pack(examples: list[Example]) -> Batch:
    """One row with the examples one after another."""
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for example in examples:
        ids += example.input_ids
        positions += range(len(example.input_ids))
        labels += _after_first(example.labels)
    return Batch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        labels=torch.tensor([labels]),
        attention_mask=None,
        rows=tuple(example.where for example in examples),
    )


def _pad(examples: list[Example], pad_token_id: int) -> Batch:
    """One row an example, padded on the right."""
    length = max(len(example.input_ids) for example in examples)
    short = [length - len(example.input_ids) for example in examples]
    rows = list(zip(examples, short, strict=True))
    return Batch(
        input_ids=torch.tensor([example.input_ids + [pad_token_id] * pad for example, pad in rows]),
        position_ids=torch.arange(length).repeat(len(rows), 1),
        labels=torch.tensor([_after_first(example.labels) + [IGNORE_INDEX] * pad for example, pad in rows]),
        attention_mask=torch.tensor([[1] * (length - pad) + [0] * pad for pad in short]),
        rows=tuple(example.where for example in examples),
    )


def _after_first(labels: list[int]) -> list[int]:
    """The labels, none on the first token: what stands before it is another document, or nothing."""
    return [IGNORE_INDEX, *labels[1:]]
