"""Boundary activations: where they wait between the way up and the way down.

Between layers a micro-batch is one tensor [B, T, H], what the next layer receives. All of them must be there again on
the way down: 1.31 MB a token for 70B. On the way up, too, micro-batch j is not needed again before all others went
through the layer. So they are one store, keyed by layer and micro-batch, which is asked in an order that is known:

    begin(like, L);  for j:     put(0, j, hidden_j)              what layer 0 receives
    for i in 0 .. L-2, for j:   x = take(i, j);  put(i+1, j, layer_i(x))
    for i in L-1 .. 0, for j:   x = take(i, j)                   layer i again, and its backward
    end()                                                        after an error too

    OnDevice     they stay
    OnHost       in host memory, page-locked where the device is a GPU
    OnFile       in a file

Away from the device, at most three are on it, whatever k and L: the one put last, whose copy out may still run; the
one taken last; and the next one, on its way in. What is taken again right after it was put (k = 1), or never followed
by another put (the very last), is not brought back: it is still there.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import IO, NamedTuple, Self

import torch

from qlora.errors import MachineError
from qlora.model.transfer import Event, Lane, host_buffer

Key = tuple[int, int]  # layer, micro-batch


def needed(nbytes: Sequence[int], layers: int) -> int:
    """Bytes that a step needs away from the device.

    nbytes  of one boundary activation of each micro-batch: B * T * H * bytes of its type
    """
    return sum(nbytes) * layers - nbytes[-1]  # the very last one never leaves


class Activations(ABC):
    """What every layer receives, from the way up to the way down. As a context it ends the step, whatever happens.

    time_waited  seconds that the host waited for the disk in this step
    """

    def __init__(self, passing: bool = False) -> None:
        self.passing, self.time_waited = passing, 0.0
        self._layers = self._micro_batches = self._puts = self._takes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, like: Sequence[torch.Tensor], layers: int) -> None:
        """Start a step. like: [B, T, H] for each micro-batch, for its shape and type alone; B and T may differ.

        Raises MachineError where there is no room.
        """
        assert not self._layers, "the step before was not ended"
        self._layers, self._micro_batches, self.time_waited = layers, len(like), 0.0
        try:
            self._open(like)
        except BaseException:
            self.end()
            raise

    def put(self, i: int, j: int, x: torch.Tensor) -> None:
        """Keep what layer i will receive. Nobody may write to `x` any more."""
        k = self._micro_batches
        first = self._puts < k
        assert self._puts < k * self._layers and (i, j) == divmod(self._puts, k), f"put({i}, {j}) is out of order"
        assert first or self._takes == self._puts - k + 1, f"put({i}, {j}) comes before take({i - 1}, {j})"
        self._puts += 1
        self._put((i, j), x.detach())

    def take(self, i: int, j: int) -> torch.Tensor:
        """What layer i receives, on the device, bit for bit as it was put. It holds until the next take."""
        ready = min(self._micro_batches + self._takes, self._micro_batches * self._layers)
        expected = self._nth_take(self._takes) if self._layers else None
        assert (i, j) == expected and self._puts == ready, f"take({i}, {j}) is out of order"
        self._takes += 1
        return self._take((i, j))

    def end(self) -> None:
        """Let go of everything that only this step needed. It may break off the step, or come twice."""
        self._layers = self._micro_batches = self._puts = self._takes = 0
        self._close()

    def _nth_take(self, n: int) -> Key | None:
        """What is taken after n other takes."""
        up = self._micro_batches * (self._layers - 1)
        if n < up:
            return divmod(n, self._micro_batches)
        i, j = divmod(n - up, self._micro_batches)
        return (self._layers - 1 - i, j) if i < (1 if self.passing else self._layers) else None

    @property
    def _all_put(self) -> bool:
        return self._puts == self._micro_batches * self._layers

    @property
    def _going_down(self) -> bool:
        """Whether what was taken last is taken no more."""
        return self._takes > self._micro_batches * (self._layers - 1)

    @abstractmethod
    def _open(self, like: Sequence[torch.Tensor]) -> None: ...

    @abstractmethod
    def _put(self, key: Key, x: torch.Tensor) -> None: ...

    @abstractmethod
    def _take(self, key: Key) -> torch.Tensor: ...

    @abstractmethod
    def _close(self) -> None: ...


class OnDevice(Activations):
    """They stay where they are."""

    def __init__(self, passing: bool = False) -> None:
        super().__init__(passing)
        self._kept: dict[Key, torch.Tensor] = {}

    def _open(self, like: Sequence[torch.Tensor]) -> None: ...

    def _put(self, key: Key, x: torch.Tensor) -> None:
        self._kept[key] = x

    def _take(self, key: Key) -> torch.Tensor:
        return self._kept.pop(key) if self.passing or self._going_down else self._kept[key]

    def _close(self) -> None:
        self._kept.clear()


class _Held(NamedTuple):
    """The activation put last. It stays on the device until the computation is behind the end of its copy out."""

    key: Key
    x: torch.Tensor
    sent: Event


class _Coming(NamedTuple):
    """The activation that is taken next, on its way into a buffer on the device.

    arrival  gives the event of its end; may wait for the disk
    """

    key: Key
    buffer: torch.Tensor
    arrival: Callable[[], Event]


class _Away(Activations):
    """They leave the device as bytes, each for its own place in one long row of bytes."""

    def __init__(self, device: torch.device, passing: bool = False) -> None:
        super().__init__(passing)
        self.device = device
        # One lane for both ways: a copy in is behind the copy out of the same bytes with no event between them. It has
        # the time: 2048 tokens of 70B are 34 MB, 1.3 ms each way at 25 GB/s, beside 50 ms of a layer at 70 TFLOP/s.
        self._lane = Lane(device)
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []  # of each micro-batch
        self._starts: list[int] = []
        self._ring: list[torch.Tensor] = []
        self._held: _Held | None = None
        self._coming: _Coming | None = None

    def _open(self, like: Sequence[torch.Tensor]) -> None:
        nbytes = [x.nbytes for x in like]
        self._kinds = [(x.shape, x.dtype) for x in like]
        self._starts = [0, *accumulate(nbytes)]  # of each micro-batch within a layer; the last one is the layer's end
        if self.passing and len(like) == 1:
            return  # nothing leaves
        self._reserve(sum(nbytes) if self.passing else needed(nbytes, self._layers), max(nbytes))
        # Two: one is computed on while the next arrives.
        self._ring = [torch.empty(max(nbytes), dtype=torch.uint8, device=self.device) for _ in range(2)]

    @property
    def _may_stay(self) -> bool:
        """Whether what was put last can be taken from where it is. What passes may be in a buffer of the ring."""
        return not self.passing or self._micro_batches == 1

    def _place(self, key: Key) -> slice:
        """Where the bytes of an activation lie."""
        layer = 0 if self.passing else key[0] * self._starts[-1]
        return slice(layer + self._starts[key[1]], layer + self._starts[key[1] + 1])

    def _put(self, key: Key, x: torch.Tensor) -> None:
        assert (x.shape, x.dtype) == self._kinds[key[1]], f"layer {key[0] - 1} does not answer with what it received"
        self._let_go()
        x = x.contiguous()
        stays = self._micro_batches == 1 if self.passing else self._all_put
        sent = None if stays else self._send(self._place(key), x.flatten().view(torch.uint8), self._lane.now())
        self._held = _Held(key, x, sent)

    def _let_go(self) -> None:
        if self._held is not None:
            # Its memory may be given to later computation. That comes after the copy: the host need not wait.
            self._lane.follow(self._held.sent)
            self._held = None

    def _take(self, key: Key) -> torch.Tensor:
        # The buffer of what was taken before is free once all computation issued so far is done.
        free = self._lane.now()
        if self._held is not None and self._held.key == key and self._may_stay:
            x = self._held.x
            if self.passing or self._going_down:
                self._let_go()
        else:
            coming, self._coming = self._coming or self._bring(key, free), None
            assert coming.key == key
            self._lane.follow(coming.arrival())
            shape, dtype = self._kinds[key[1]]
            x = coming.buffer.view(dtype).view(shape)
        following = self._nth_take(self._takes)
        stays = self._held is not None and self._held.key == following and self._all_put and self._may_stay
        if following is not None and not stays and (self._all_put or self._takes < self._puts):
            self._coming = self._bring(following, free)
        return x

    def _bring(self, key: Key, after: Event) -> _Coming:
        place = self._place(key)
        self._ring.reverse()
        buffer = self._ring[0][: place.stop - place.start]
        return _Coming(key, buffer, self._fetch(place, buffer, after))

    def _close(self) -> None:
        self._let_go()
        if self._coming is not None:
            with contextlib.suppress(MachineError):  # nobody will read it; but it must not arrive in freed memory
                self._lane.follow(self._coming.arrival())
            self._coming = None
        self._ring = []

    @abstractmethod
    def _reserve(self, nbytes: int, largest: int) -> None:
        """Make room for `nbytes`, which come and go in pieces of up to `largest`."""

    @abstractmethod
    def _send(self, place: slice, source: torch.Tensor, after: Event) -> Event:
        """Start to move bytes off the device, behind `after`. The event says that `source` was read."""

    @abstractmethod
    def _fetch(self, place: slice, to: torch.Tensor, after: Event) -> Callable[[], Event]:
        """Start to move bytes to the device, behind `after`. The answer gives the event of their arrival."""


class OnHost(_Away):
    """They wait in host memory: one arena, kept between steps, grown when a step needs more."""

    def __init__(self, device: torch.device, passing: bool = False) -> None:
        super().__init__(device, passing)
        self._arena: torch.Tensor | None = None

    def _reserve(self, nbytes: int, largest: int) -> None:
        if self._arena is None or self._arena.numel() < nbytes:
            self._arena = None  # before there is another
            self._arena = host_buffer(nbytes, self.device)

    def _send(self, place: slice, source: torch.Tensor, after: Event) -> Event:
        assert self._arena is not None
        return self._lane.copy(self._arena[place], source, after)

    def _fetch(self, place: slice, to: torch.Tensor, after: Event) -> Callable[[], Event]:
        assert self._arena is not None
        arrived = self._lane.copy(to, self._arena[place], after)
        return lambda: arrived


class _Staging:
    """Host memory between the device and the file: used by the disk and by a copy in turn."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.view = memory.numpy().data
        self.copied: Event = None
        self.written: Future[None] | None = None


class OnFile(_Away):
    """They wait in a temporary file, which vanishes with the process, however that ends.

    One background thread does all its reading and writing, in the order asked for. So what is read was written before,
    and the thread is the only one who waits for copies.

    directory  of the file; it must exist
    """

    def __init__(self, device: torch.device, directory: str | Path, passing: bool = False) -> None:
        super().__init__(device, passing)
        self.directory = Path(directory)
        self._file: IO[bytes] | None = None
        self._worker = ThreadPoolExecutor(1, "activations")
        self._failed: OSError | None = None
        self._largest = 0
        self._out: list[_Staging] = []
        self._in: list[_Staging] = []

    def _reserve(self, nbytes: int, largest: int) -> None:
        self._failed = None
        try:
            if self._file is None:
                # On Linux it never has a name, on Windows the system deletes it: a kill leaves nothing behind.
                self._file = tempfile.TemporaryFile(prefix="qlora-activations-", dir=self.directory, buffering=0)  # noqa: SIM115
            ours = self._file.seek(0, io.SEEK_END)
            free = shutil.disk_usage(self.directory).free + ours
        except OSError as error:
            raise self._complaint(error) from error
        if nbytes > free:
            raise MachineError(
                f"the activations of a step need {nbytes / 2**30:.2f} GiB of disk; "
                f"{self.directory} has {free / 2**30:.2f} GiB free\n"
                "  name a directory on a larger disk: memory.activations_dir, or keep them: memory.activations: host"
            )
        if largest > self._largest:
            self._out, self._in, self._largest = [], [], largest  # freed before there are others
            pieces = [_Staging(piece) for piece in host_buffer(4 * largest, self.device).split(largest)]
            self._out, self._in = pieces[:2], pieces[2:]

    def _send(self, place: slice, source: torch.Tensor, after: Event) -> Event:
        self._out.reverse()
        staging, n = self._out[0], source.numel()
        self._wait(staging.written)
        staging.copied = self._lane.copy(staging.memory[:n], source, after)
        staging.written = self._worker.submit(self._in_turn, self._write, place.start, staging, n)
        return staging.copied

    def _fetch(self, place: slice, to: torch.Tensor, after: Event) -> Callable[[], Event]:
        self._in.reverse()
        staging, n = self._in[0], to.numel()
        read = self._worker.submit(self._in_turn, self._read, place.start, staging, n)

        def arrival() -> Event:
            self._wait(read)
            staging.copied = self._lane.copy(to, staging.memory[:n], after)
            return staging.copied

        return arrival

    def _wait(self, job: Future[None] | None) -> None:
        if job is None:
            return
        started = time.perf_counter()
        try:
            job.result()
        except OSError as error:
            raise self._complaint(error) from error
        finally:
            self.time_waited += time.perf_counter() - started

    def _complaint(self, error: OSError) -> MachineError:
        return MachineError(f"the temporary file for activations in {self.directory}: {error.strerror or error}")

    def _close(self) -> None:
        super()._close()
        self._worker.submit(lambda: None).result()  # the thread is through with the staging and the file
        for staging in self._out:
            staging.written = None

    # In the background thread:

    def _in_turn(self, job: Callable[[int, memoryview], None], start: int, staging: _Staging, n: int) -> None:
        if self._failed is not None:  # after a failed write, no read gives what was put
            raise self._failed
        try:
            if staging.copied is not None:
                staging.copied.synchronize()
            job(start, staging.view[:n])
        except OSError as error:
            self._failed = error
            raise

    def _write(self, start: int, source: memoryview) -> None:
        assert self._file is not None
        self._file.seek(start)
        while source:
            source = source[self._file.write(source) :]

    def _read(self, start: int, to: memoryview) -> None:
        assert self._file is not None
        self._file.seek(start)
        while to:
            got: int = self._file.readinto(to)  # type: ignore[attr-defined]
            if not got:
                raise OSError("it is shorter than what was written")
            to = to[got:]
