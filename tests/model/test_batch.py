"""A step's rows, cut anew: by tokens, in their order, with nothing of them changed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora.model.batch import Batch, divisible, halved, regroup
from tests.conftest import random_batch


def packed(*rows, seed=0):
    """Rows of documents of these lengths, with the name of each document."""
    tokens = sum(rows[0])
    like = random_batch(len(rows), tokens, seed=seed)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    names = tuple(f"{seed}:{row}.{n}" for row, lengths in enumerate(rows) for n in range(len(lengths)))
    return Batch(like.input_ids, positions, like.labels, None, names)


def padded(*lengths, seed=0):
    like, width = random_batch(len(lengths), max(lengths), seed=seed), max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    return Batch(like.input_ids, like.position_ids, like.labels, mask, like.rows)


def rows_of(batches):
    """Each row of each micro-batch as what it is made of."""
    found = []
    for batch in batches:
        names, tensors = iter(batch.rows), (batch.input_ids, batch.position_ids, batch.labels, batch.attention_mask)
        for row, lengths in enumerate(batch.documents):
            contents = tuple(None if tensor is None else tuple(tensor[row].tolist()) for tensor in tensors)
            found.append((contents, lengths, tuple(next(names) for _ in lengths)))
        assert next(names, None) is None
    return found


def sizes(batches):
    return [tuple(batch.input_ids.shape) for batch in batches]


widths = st.sampled_from([6, 9, 12])
batches_of_any_kind = st.lists(
    st.builds(
        lambda width, rows, kind, seed: padded(*[width] * rows, seed=seed) if kind else packed(*rows_like(width, rows)),
        widths,
        st.integers(1, 5),
        st.booleans(),
        st.integers(0, 3),
    ),
    max_size=5,
)


def rows_like(width, rows):
    return [(width,) if row % 2 else (width - 4, 4) for row in range(rows)]


@given(batches_of_any_kind, st.integers(0, 40))
def test_rows_stay_as_they_are_and_in_their_order_and_no_group_holds_too_much(batches, most):
    cut = regroup(batches, most)
    assert rows_of(cut) == rows_of(batches)
    assert sum(batch.supervised for batch in cut) == sum(batch.supervised for batch in batches)
    for batch in cut:
        rows, width = batch.input_ids.shape
        assert not most or rows == 1 or rows * width <= most


@pytest.mark.parametrize("padding", [False, True])
def test_a_micro_batch_that_holds_too_much_is_split_by_rows(padding):
    batch = padded(9, 12, 7, 12, 3) if padding else packed(*[(12,)] * 5)
    assert sizes(regroup([batch], 30)) == [(2, 12), (2, 12), (1, 12)]
    assert sizes(regroup([batch], 5)) == [(1, 12)] * 5
    assert sizes(regroup([batch], 60)) == [(5, 12)]


def test_zero_leaves_all_as_it_comes():
    batches = [packed(*[(12,)] * 5), packed((12,), seed=1), padded(9, 12)]
    assert regroup(batches, 0) == batches


def test_what_is_left_of_a_split_goes_with_its_neighbour_and_padded_rows_with_none():
    three = [packed(*[(12,)] * 3, seed=seed) for seed in range(2)]
    assert sizes(regroup(three, 24)) == [(2, 12)] * 3
    assert sizes(regroup([packed((12,)), packed((12,)), packed((9,)), packed((12,))], 24)) == [(2, 12), (1, 9), (1, 12)]
    assert sizes(regroup([packed((12,)), padded(12, 5), packed((12,))], 100)) == [(1, 12), (2, 12), (1, 12)]


def test_each_piece_names_its_own_documents():
    batch = packed((12,), (5, 7), (4, 4, 4), (12,))
    assert [piece.rows for piece in regroup([batch], 12)] == [
        ("0:0.0",),
        ("0:1.0", "0:1.1"),
        ("0:2.0", "0:2.1", "0:2.2"),
        ("0:3.0",),
    ]
    assert [piece.documents for piece in regroup([batch], 24)] == [((12,), (5, 7)), ((4, 4, 4), (12,))]


def documents_of(batches):
    """Each document of packed micro-batches: its tokens, positions, labels and name."""
    found = []
    for batch in batches:
        names = iter(batch.rows)
        for row, lengths in enumerate(batch.documents):
            start = 0
            for length in lengths:
                part = (row, slice(start, start + length))
                tensors = (batch.input_ids, batch.position_ids, batch.labels)
                found.append((next(names), *(tuple(tensor[part].tolist()) for tensor in tensors)))
                start += length
    return found


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4))
def test_halved_micro_batches_hold_the_same_documents_until_each_is_one(packs):
    batches = [packed(lengths, seed=number) for number, lengths in enumerate(packs)]
    expected = documents_of(batches)
    widest = max(batch.input_ids.numel() for batch in batches)
    while divisible(batches):
        more = halved(batches)
        assert len(more) > len(batches) and documents_of(more) == expected
        assert max(batch.input_ids.numel() for batch in more) <= widest
        batches = more
    assert halved(batches) == batches and len(batches) == len(expected)


def test_a_halved_micro_batch_is_cut_between_rows_and_a_row_nearest_to_its_middle():
    assert sizes(halved([padded(3, 5, 4)])) == [(1, 5), (2, 5)]
    assert sizes(halved([packed((2, 2, 5, 1))])) == [(1, 4), (1, 6)]
