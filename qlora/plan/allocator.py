"""What torch's caching allocator of a GPU reserves for a row of allocations, which is more than what is allocated.

It is replayed: the planner knows every allocation of a step and when it ends. Written from the documented behaviour
(PyTorch, "CUDA semantics", memory management, and the constants of c10/core/AllocatorConfig.h), default settings:

    sizes       are rounded up to 512 bytes
    pools       up to 1 MiB: small, in segments of 2 MiB; others: large, in segments of 20 MiB below 10 MiB, else of
                their own size rounded up to 2 MiB
    a block     is the smallest free one that is large enough, of these the one with the lowest address. What is left
                over becomes a free block from 512 bytes on in the small pool, above 1 MiB in the large one; else it is
                allocated along with it, and counts as allocated.
    freed       blocks merge with free neighbours of their segment, and segments stay
    out of memory  gives all segments that are wholly free back, then tries once more

With expandable segments there is one range of addresses a pool, which is mapped from below in pages of 2 MiB (small)
and 20 MiB (large). A request that finds no free block takes the lowest hole that is large enough with the free block in
front of it; everything is split from 512 bytes on; when memory is out, wholly free pages are unmapped.

Assumed: one stream; segments come at rising addresses, which only decides between equals; the range has no end.
"""

from __future__ import annotations

from bisect import bisect_left, insort

MIB = 2**20
ROUND, SMALL = 512, MIB
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB
OWN_SEGMENT, OWN_ROUND = 10 * MIB, 2 * MIB  # from here on a request has a segment of its own size
_ENDLESS = LARGE_SEGMENT << 40  # whole pages of either pool
USED, FREE, HOLE = range(3)  # what a block is; a hole has addresses and no memory


class Full(Exception):
    """The limit does not allow an allocation, even with nothing cached."""


class Block:
    """Bytes next to each other in a segment. What `malloc` gives is one; its bytes are start .. start + size."""

    __slots__ = ("after", "before", "pool", "size", "start", "state")

    def __init__(self, start: int, size: int, pool: _Pool, state: int) -> None:
        self.start, self.size, self.pool, self.state = start, size, pool, state
        self.before: Block | None = None
        self.after: Block | None = None


class _Pool:
    """The free blocks and the holes of the small or of the large allocations."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.free: list[tuple[int, int]] = []  # (size, start): the order of the best fit
        self.holes: list[int] = []  # starts
        self.at: dict[int, Block] = {}  # start -> free block or hole

    def add(self, block: Block) -> None:
        self.at[block.start] = block
        if block.state == FREE:
            insort(self.free, (block.size, block.start))
        else:
            insort(self.holes, block.start)

    def remove(self, block: Block) -> None:
        del self.at[block.start]
        if block.state == FREE:
            self.free.pop(bisect_left(self.free, (block.size, block.start)))
        else:
            self.holes.remove(block.start)

    def best_fit(self, size: int) -> Block | None:
        """The smallest free block of at least `size`; one before a hole counts as large as it could grow."""
        best, room = None, 0
        for i in range(bisect_left(self.free, (size, 0)), len(self.free)):
            block = self.at[self.free[i][1]]
            could_be = block.size + (block.after.size if block.after is not None and block.after.state == HOLE else 0)
            if best is not None and could_be >= room:
                break
            best, room = block, could_be
        return best


class CachingAllocator:
    """Replays allocations.

    expandable     as PYTORCH_ALLOC_CONF=expandable_segments:True
    limit          bytes that may be reserved; None: any number
    allocated      bytes of the blocks in use, as torch.cuda.memory_allocated
    reserved       bytes taken from the device, as torch.cuda.memory_reserved
    peak_allocated, peak_reserved  the most of either so far
    """

    def __init__(self, expandable: bool = False, limit: int | None = None) -> None:
        self.expandable, self.limit = expandable, limit
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._top = 0  # address of the next segment
        self._small, self._large = _Pool(SMALL_SEGMENT), _Pool(LARGE_SEGMENT)
        for start, pool in enumerate((self._small, self._large) if expandable else ()):
            pool.add(Block(start * _ENDLESS, _ENDLESS, pool, HOLE))

    def malloc(self, nbytes: int) -> Block:
        """Allocate. Raises Full, and then has given back what was cached; nothing else has changed."""
        size = -(-nbytes // ROUND) * ROUND
        pool = self._small if size <= SMALL else self._large
        if not size:  # torch allocates nothing; `free` takes it all the same
            return Block(0, 0, pool, USED)
        block = pool.best_fit(size)
        if block is None:
            take = self._expand if self.expandable else self._segment
            block = take(pool, size) or self.empty_cache() or take(pool, size)
            if block is None:
                raise Full(f"{nbytes:,} bytes do not fit: {self.reserved:,} of {self.limit:,} are reserved")
        pool.remove(block)
        left = block.size - size
        if left >= ROUND if pool is self._small or self.expandable else left > SMALL:
            pool.add(_cut(block, size, FREE))
        block.state = USED
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Free what `malloc` gave."""
        assert block.state == USED, "freed twice"
        self.allocated -= block.size
        block.state = FREE
        if block.size:
            self._merge(block)

    def empty_cache(self) -> None:
        """Give back what is wholly free, as torch.cuda.empty_cache."""
        for pool in (self._small, self._large):
            for _, start in list(pool.free):
                block = pool.at[start]
                if self.expandable:
                    self._unmap(block)
                elif block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def _merge(self, block: Block) -> None:
        """Add a free block or a hole that the pool does not know, in one with its neighbours of the same kind."""
        pool = block.pool
        before, after = block.before, block.after
        if before is not None and before.state == block.state:
            pool.remove(before)
            block.start, block.size, block.before = before.start, before.size + block.size, before.before
        if after is not None and after.state == block.state:
            pool.remove(after)
            block.size, block.after = block.size + after.size, after.after
        if block.before is not None:
            block.before.after = block
        if block.after is not None:
            block.after.before = block
        pool.add(block)

    def _reserve(self, nbytes: int) -> bool:
        if self.limit is not None and self.reserved + nbytes > self.limit:
            return False
        self.reserved += nbytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _segment(self, pool: _Pool, size: int) -> Block | None:
        """A new segment for a block of `size`, free."""
        nbytes = pool.page if size < OWN_SEGMENT else -(-size // OWN_ROUND) * OWN_ROUND
        if not self._reserve(nbytes):
            return None
        block = Block(self._top, nbytes, pool, FREE)
        self._top += nbytes
        pool.add(block)
        return block

    def _expand(self, pool: _Pool, size: int) -> Block | None:
        """A free block of at least `size` where the lowest hole is that has the addresses for it."""
        holes = (pool.at[start] for start in pool.holes)
        starts = (h.before if h.before is not None and h.before.state == FREE else h for h in holes)
        block = next(start for start in starts if _has_room(start, size))  # there is one: the last hole has no end
        while block.state == HOLE or block.size < size:
            hole, missing = (block, size) if block.state == HOLE else (block.after, size - block.size)
            assert hole is not None
            mapped = min(-(-missing // pool.page) * pool.page, hole.size)
            if not self._reserve(mapped):
                return None
            pool.remove(hole)
            if mapped < hole.size:
                pool.add(_cut(hole, mapped, HOLE))
            hole.state = FREE
            self._merge(hole)
            block = hole
        return block

    def _unmap(self, block: Block) -> None:
        """Make a hole of the whole pages in a free block."""
        pool = block.pool
        start = -(-block.start // pool.page) * pool.page
        end = (block.start + block.size) // pool.page * pool.page
        if end <= start:
            return
        pool.remove(block)
        if end < block.start + block.size:
            pool.add(_cut(block, end - block.start, FREE))
        if block.start < start:
            front, block = block, _cut(block, start - block.start, FREE)
            pool.add(front)
        self.reserved -= block.size
        block.state = HOLE
        self._merge(block)


def _has_room(block: Block | None, size: int) -> bool:
    """Whether from this block on `size` addresses in a row are not in use."""
    while size > 0 and block is not None and block.state != USED:
        size, block = size - block.size, block.after
    return size <= 0


def _cut(block: Block, size: int, state: int) -> Block:
    """Cut `block` down to `size`; what is left over is a new block behind it, of that state."""
    rest = Block(block.start + size, block.size - size, block.pool, state)
    rest.before, rest.after = block, block.after
    if rest.after is not None:
        rest.after.before = rest
    block.size, block.after = size, rest
    return rest
