"""Micro-batches: every example once an epoch, documents apart, and a plan that follows from seed and epoch."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora.data.chat import Example
from qlora.data.packing import Batches, batches, best_fit_decreasing
from qlora.model.batch import IGNORE_INDEX

CAPACITY = 20
lengths = st.lists(st.integers(1, CAPACITY), max_size=60)


def example(length: int, first: int = 0) -> Example:
    """Ids first, first + 1, ...; all but the first are learned."""
    ids = list(range(first, first + length))
    return Example(input_ids=ids, labels=[IGNORE_INDEX, *ids[1:]], where=f"a.jsonl:{first}")


EXAMPLES = [example(2 + number * 7 % 9, first=100 * number) for number in range(23)]


def plan(*, packing: bool = True, seed: int | None = 0, epoch: int = 0, size: int = 2, limit: int = 12) -> Batches:
    return batches(
        EXAMPLES,
        max_seq_length=limit,
        per_device_train_batch_size=size,
        pad_token_id=9,
        packing=packing,
        seed=seed,
        epoch=epoch,
    )


def fewest_bins(sizes: list[int], capacity: int) -> int:
    """By trying every assignment of items to bins."""
    for count in range(1, len(sizes) + 1):
        for chosen in product(range(count), repeat=len(sizes)):
            loads = Counter[int]()
            for size, at in zip(sizes, chosen, strict=True):
                loads[at] += size
            if max(loads.values()) <= capacity:
                return count
    return 0


# --- best fit decreasing ----------------------------------------------------------------------------------------------


@given(lengths)
def test_every_item_is_in_one_bin_and_no_bin_is_too_full(lengths):
    bins = best_fit_decreasing(lengths, CAPACITY)
    assert sorted(index for each in bins for index in each) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in each) <= CAPACITY for each in bins)


@given(lengths)
def test_no_two_bins_could_be_one(lengths):
    loads = sorted(sum(lengths[index] for index in each) for each in best_fit_decreasing(lengths, CAPACITY))
    assert len(loads) < 2 or loads[0] + loads[1] > CAPACITY


@given(st.lists(st.integers(1, CAPACITY), max_size=6))
def test_bins_are_within_johnsons_bound_of_the_fewest(lengths):
    assert len(best_fit_decreasing(lengths, CAPACITY)) <= 11 / 9 * fewest_bins(lengths, CAPACITY) + 6 / 9


@given(lengths, st.randoms())
def test_the_number_of_bins_does_not_depend_on_the_order(lengths, random):
    bins = best_fit_decreasing(lengths, CAPACITY)
    random.shuffle(lengths)
    assert len(best_fit_decreasing(lengths, CAPACITY)) == len(bins)


def test_an_item_goes_where_it_leaves_least_room():
    # 12 | 10 + 9: the last item fits both, and first fit would put it beside 12.
    assert best_fit_decreasing([12, 10, 9, 1], 20) == [[0], [1, 2, 3]]


def test_an_item_longer_than_a_bin_is_an_error():
    with pytest.raises(ValueError, match="21 tokens does not fit a bin of 20"):
        best_fit_decreasing([3, 21], CAPACITY)


# --- the plan of an epoch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", [0, None])
def test_an_epoch_has_every_example_once(packing, seed):
    rows = [row for batch in plan(packing=packing, seed=seed) for row in batch.rows]
    assert sorted(rows) == sorted(example.where for example in EXAMPLES)


@pytest.mark.parametrize("packing", [True, False])
def test_seed_and_epoch_decide_the_plan(packing):
    assert plan(packing=packing, seed=3, epoch=1).plan == plan(packing=packing, seed=3, epoch=1).plan
    different = [plan(packing=packing, seed=seed, epoch=epoch).plan for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert all(one != other for number, one in enumerate(different) for other in different[:number])


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_has_as_many_micro_batches(packing):
    assert len({len(plan(packing=packing, epoch=epoch)) for epoch in range(20)}) == 1


def test_epochs_pack_other_examples_together():
    together = [{frozenset(indices) for indices in plan(epoch=epoch).plan} for epoch in (0, 1)]
    assert together[0] != together[1]


def test_long_examples_do_not_come_first():
    longest = [max(len(EXAMPLES[index].input_ids) for index in indices) for indices in plan(size=1).plan]
    assert longest != sorted(longest, reverse=True)


def test_without_a_seed_rows_stay_in_order():
    assert [row for batch in plan(packing=False, seed=None) for row in batch.rows] == [row.where for row in EXAMPLES]


def test_a_slice_is_what_is_left_to_do_after_a_resume():
    whole = plan()
    rest = whole[3:]
    assert len(rest) == len(whole) - 3
    assert [batch.rows for batch in rest] == [batch.rows for batch in whole][3:]


def test_an_example_longer_than_a_sequence_is_an_error_however_large_the_micro_batch():
    with pytest.raises(ValueError, match="10 tokens is longer than max_seq_length 8"):
        plan(limit=8, size=4)


def test_nothing_makes_no_batches():
    none = batches([], max_seq_length=8, per_device_train_batch_size=2, pad_token_id=0, packing=True, seed=0)
    assert len(none) == 0
    assert none.fill == 0


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_a_packed_micro_batch_is_its_documents_one_after_another():
    three = [example(3, 10), example(2, 20), example(4, 30)]
    [batch] = batches(three, max_seq_length=5, per_device_train_batch_size=2, pad_token_id=0, packing=True, seed=None)
    x = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[30, 31, 32, 33, 10, 11, 12, 20, 21]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert batch.labels.tolist() == [[x, 31, 32, 33, x, 11, 12, x, 21]]
    assert batch.attention_mask is None
    assert batch.rows == ("a.jsonl:30", "a.jsonl:10", "a.jsonl:20")


def test_packed_micro_batches_hold_at_most_batch_size_times_max_seq_length():
    sizes = [batch.input_ids.shape for batch in plan(size=2, limit=12)]
    assert all(rows == 1 and tokens <= 24 for rows, tokens in sizes)
    assert max(tokens for _, tokens in sizes) > 12


def test_a_padded_micro_batch_is_padded_on_the_right():
    two = [example(3, 10), example(2, 20)]
    [batch] = batches(two, max_seq_length=5, per_device_train_batch_size=2, pad_token_id=7, packing=False, seed=None)
    x = IGNORE_INDEX
    assert batch.attention_mask is not None
    assert batch.input_ids.tolist() == [[10, 11, 12], [20, 21, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.labels.tolist() == [[x, 11, 12], [x, 21, x]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.rows == ("a.jsonl:10", "a.jsonl:20")


@pytest.mark.parametrize("packing", [True, False])
def test_no_document_begins_with_a_learned_token(packing):
    learned_throughout = [Example(input_ids=[4, 5, 6], labels=[4, 5, 6], where="a:1")] * 4
    for batch in batches(
        learned_throughout, max_seq_length=6, per_device_train_batch_size=1, pad_token_id=0, packing=packing, seed=0
    ):
        assert (batch.labels[batch.position_ids == 0] == IGNORE_INDEX).all()
        assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64


def test_packed_and_padded_learn_the_same_tokens():
    def learned(packing: bool) -> list[int]:
        return sorted(
            token
            for batch in plan(packing=packing)
            for positions, targets in [batch.targets()]
            for token, before in zip(targets.tolist(), batch.input_ids.flatten()[positions].tolist(), strict=True)
            if token == before + 1  # predicted from the token before it in its own document
        )

    assert learned(True) == learned(False) == sorted(token for each in EXAMPLES for token in each.input_ids[1:])


def test_fill_is_the_share_of_places_that_hold_tokens():
    two = [example(4), example(2)]
    packed = batches(two, max_seq_length=4, per_device_train_batch_size=2, pad_token_id=0, packing=True, seed=0)
    padded = batches(two, max_seq_length=4, per_device_train_batch_size=2, pad_token_id=0, packing=False, seed=0)
    assert (packed.fill, padded.fill) == (6 / 8, 6 / 8)
