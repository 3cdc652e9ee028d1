"""The replayed allocator reserves what torch's does."""

import random
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.plan.allocator import FREE, HOLE, MIB, Block, CachingAllocator, Full

SIZES = st.one_of(
    st.integers(0, 2048), st.integers(2**18, 2**20 + 1), st.integers(MIB, 30 * MIB), st.sampled_from([MIB, 10 * MIB])
)
# Up to so many allocations; each second number says which of those alive is freed, or none.
EVENTS = st.lists(st.tuples(SIZES, st.none() | st.integers(0, 7)), max_size=60)


def neighbours(block: Block) -> list[Block]:
    """The segment that a block is in, from below."""
    while block.before is not None:
        block = block.before
    found = [block]
    while (after := found[-1].after) is not None:
        found.append(after)
    return found


def check(allocator: CachingAllocator, alive: list[Block]) -> None:
    pools = (allocator._small, allocator._large)
    known = [block for pool in pools for block in pool.at.values()]
    blocks = {id(b): b for block in (*known, *alive) for b in neighbours(block)}.values()
    spans = sorted((b.start, b.start + b.size) for b in blocks)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans)), "overlap"
    for block in blocks:
        if block.after is not None:
            assert block.after.before is block and block.start + block.size == block.after.start
            assert not block.state == block.after.state != 0, "two neighbours of a kind were not merged"
        assert not block.size % 512 and not (block.state == HOLE and block.size % block.pool.page)
    assert allocator.allocated == sum(b.size for b in alive)
    assert allocator.reserved == sum(b.size for b in blocks if b.state != HOLE)
    for pool in pools:
        assert pool.free == sorted((b.size, b.start) for b in pool.at.values() if b.state == FREE)
        assert pool.holes == sorted(b.start for b in pool.at.values() if b.state == HOLE)


@pytest.mark.parametrize("expandable", [False, True])
@settings(deadline=None, max_examples=200)
@given(events=EVENTS, limit=st.none() | st.integers(2 * MIB, 100 * MIB))
def test_blocks_tile_their_segments_and_all_comes_back(expandable, events, limit):
    allocator, alive = CachingAllocator(expandable, limit), []
    for nbytes, which in events:
        try:
            block = allocator.malloc(nbytes)
        except Full:
            assert limit is not None
        else:
            assert nbytes <= block.size
            if nbytes:
                alive.append(block)
        if which is not None and alive:
            allocator.free(alive.pop(which % len(alive)))
        check(allocator, alive)
        assert allocator.allocated <= allocator.reserved <= allocator.peak_reserved
        assert limit is None or allocator.peak_reserved <= limit
        assert allocator.peak_reserved <= sum(size + 20 * MIB for size, _ in events)
    for block in alive:
        allocator.free(block)
    check(allocator, [])
    assert allocator.allocated == 0
    if not expandable:  # each segment is one block again
        free = [block for pool in (allocator._small, allocator._large) for block in pool.at.values()]
        assert all(block.before is block.after is None for block in free)
    allocator.empty_cache()
    assert allocator.reserved == 0


def test_two_hundred_small_ones_fill_segments_of_2_mib():
    allocator = CachingAllocator()
    for _ in range(200):
        allocator.malloc(20_000)  # 20,480 rounded: 102 in a segment
    assert (allocator.allocated, allocator.reserved) == (200 * 20_480, 4 * MIB)


@pytest.mark.parametrize(
    ("nbytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 513, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # 1 MiB is left over, which is not more than 1 MiB
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # and this is
    ],
)
def test_one_allocation_takes_a_segment_of_its_class(nbytes, allocated, reserved):
    allocator = CachingAllocator()
    allocator.malloc(nbytes)
    assert (allocator.allocated, allocator.reserved) == (allocated, reserved)


def test_a_hole_in_the_middle_is_not_used_for_something_larger():
    allocator = CachingAllocator()
    held = [allocator.malloc(5 * MIB) for _ in range(4)]  # one segment of 20 MiB
    assert allocator.reserved == 20 * MIB
    allocator.free(held[0])
    allocator.free(held[2])
    allocator.malloc(9 * MIB)
    assert allocator.reserved == 40 * MIB
    allocator.free(held[1])  # 15 MiB in a row now
    allocator.malloc(15 * MIB)
    assert allocator.reserved == 40 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken():
    allocator = CachingAllocator()
    large, small = allocator.malloc(40 * MIB), allocator.malloc(30 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert allocator.malloc(28 * MIB).start == 40 * MIB
    assert allocator.malloc(40 * MIB).start == 0
    assert allocator.reserved == 70 * MIB


def test_expandable_segments_grow_by_pages_from_what_is_free_at_their_end():
    allocator = CachingAllocator(expandable=True)
    first = allocator.malloc(15 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.malloc(10 * MIB)  # 5 are free before the hole, so one page more is enough
    assert allocator.reserved == 40 * MIB
    allocator.free(first)
    allocator.malloc(16 * MIB)  # 15 free below, 15 free at the end: there, with one page more
    assert allocator.reserved == 60 * MIB
    allocator.malloc(3 * MIB)  # the 15 below, not the growing end, although that is the smaller one
    assert first.start == allocator._large.at.get(first.start + 3 * MIB, first).start - 3 * MIB


def test_what_is_cached_is_given_back_before_memory_is_out():
    for expandable, kept in ((False, 12 * MIB), (True, 20 * MIB)):
        allocator = CachingAllocator(expandable, limit=100 * MIB)
        allocator.malloc(12 * MIB)
        for nbytes in (30 * MIB, 40 * MIB):
            allocator.free(allocator.malloc(nbytes))
        allocator.malloc(80 * MIB)
        assert allocator.reserved <= 100 * MIB
        with pytest.raises(Full, match="do not fit"):
            allocator.malloc(90 * MIB)
        assert allocator.allocated == 92 * MIB and allocator.reserved >= kept + 80 * MIB


def test_the_limit_holds_to_the_byte():
    CachingAllocator(limit=12 * MIB).malloc(12 * MIB)
    with pytest.raises(Full):
        CachingAllocator(limit=12 * MIB - 1).malloc(12 * MIB)


def test_what_is_freed_twice_is_noticed():
    allocator = CachingAllocator()
    block = allocator.malloc(1)
    allocator.free(block)
    with pytest.raises(AssertionError, match="twice"):
        allocator.free(block)


def random_events(count: int, seed: int) -> list[tuple[str, int]]:
    """("malloc", bytes) or ("free", which of those alive)."""
    dice, alive, events = random.Random(seed), 0, []
    for _ in range(count):
        if alive and dice.random() < (0.5 if alive < 200 else 0.7):
            events.append(("free", dice.randrange(alive)))
            alive -= 1
        else:
            events.append(("malloc", int(2 ** dice.uniform(8, 25))))
            alive += 1
    return events


def test_a_hundred_thousand_events_are_replayed_in_a_second():
    for expandable in (False, True):
        allocator, alive, started = CachingAllocator(expandable), [], time.process_time()
        for what, n in random_events(100_000, 0):
            if what == "malloc":
                alive.append(allocator.malloc(n))
            else:
                allocator.free(alive.pop(n))
        assert time.process_time() - started < 3  # 0.5 s where nothing else runs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs torch's own allocator of a GPU")
@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_it_reserves_what_torch_reserves(expandable, seed):
    setting = torch.cuda.memory._set_allocator_settings
    torch.cuda.empty_cache()
    if torch.cuda.memory_reserved():
        pytest.skip("other tests hold memory of the device")
    setting(f"expandable_segments:{expandable}")
    try:
        allocator, blocks, tensors = CachingAllocator(expandable), [], []
        for what, n in random_events(2000, seed):
            if what == "malloc":
                blocks.append(allocator.malloc(n))
                tensors.append(torch.empty(n, dtype=torch.uint8, device="cuda"))
            else:
                allocator.free(blocks.pop(n))
                del tensors[n]
            assert allocator.allocated == torch.cuda.memory_allocated()
            assert allocator.reserved == torch.cuda.memory_reserved()
    finally:
        del tensors
        torch.cuda.empty_cache()
        setting("expandable_segments:False")
