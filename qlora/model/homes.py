"""Where frozen layers live when they are not on the device: in host memory, or in the NF4 cache on disk."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from qlora.errors import AdapterError, CacheError
from qlora.model.nf4 import FourBit, FourBitWeight, parts_of
from qlora.model.shards import CHUNK, Layout, ShardReader
from qlora.model.transfer import PAGE, Event, Lane, host_buffer

READERS = 4  # threads that read one layer: an SSD gives its bandwidth only to several requests at a time


class LayerHome(Protocol):
    """Where one layer's four-bit parts live when they are not on the device."""

    tier: str
    layout: Layout

    def fetch(self, slot: torch.Tensor, lane: Lane, after: Event) -> Callable[[], Event]:
        """Begin to bring the whole layer into `slot`, uint8 [at least padded(layout.nbytes)], not before `after`.

        returns what waits until the bytes are there or on their way, and gives the event of their arrival
        """
        ...

    def parts(self, weight: FourBitWeight) -> dict[str, torch.Tensor]: ...
    def replace(self, weight: FourBitWeight, parts: Mapping[str, torch.Tensor]) -> None: ...


def key(name: str, part: str) -> str:
    """What a part of the weight `name` is called in its layer's layout."""
    return f"{name}.{part}"


def layout_of(weights: Mapping[str, Sequence[int]], four_bit: FourBit) -> Layout:
    """Where each part of a group of weights lies. weights: name -> shape."""
    return Layout.of(
        {key(name, part): kind for name, shape in weights.items() for part, kind in parts_of(shape, four_bit).items()}
    )


def padded(nbytes: int) -> int:
    """Bytes in whole pages, as direct I/O reads them."""
    return -(-nbytes // PAGE) * PAGE


class OnHost:
    """A layer in host memory."""

    tier = "host"

    def __init__(self, layout: Layout, buffer: torch.Tensor) -> None:
        """buffer: uint8 [padded(layout.nbytes)], of `host_buffer`'s kind."""
        self.layout, self.buffer = layout, buffer

    @cached_property
    def _views(self) -> dict[str, torch.Tensor]:
        return self.layout.views(self.buffer)

    def fetch(self, slot: torch.Tensor, lane: Lane, after: Event) -> Callable[[], Event]:
        n = self.layout.nbytes
        event = lane.copy(slot[:n], self.buffer[:n], after)
        return lambda: event

    def parts(self, weight: FourBitWeight) -> dict[str, torch.Tensor]:
        return {part: self._views[key(weight.name, part)].to(weight.device) for part in parts_in(weight)}

    def replace(self, weight: FourBitWeight, parts: Mapping[str, torch.Tensor]) -> None:
        for part, value in parts.items():
            self._views[key(weight.name, part)].copy_(value)


class OnFile:
    """A layer in the NF4 cache."""

    tier = "file"

    def __init__(self, layout: Layout, disk: Disk) -> None:
        self.layout, self.disk = layout, disk
        self.reader: ShardReader | None = None  # there once the cache is complete

    def fetch(self, slot: torch.Tensor, lane: Lane, after: Event) -> Callable[[], Event]:
        assert self.reader is not None
        return self.disk.read(self.reader, slot, lane, after).result

    def parts(self, weight: FourBitWeight) -> dict[str, torch.Tensor]:
        assert self.reader is not None
        try:
            with safe_open(self.reader.path, framework="pt", backend="pread") as f:
                return {part: f.get_tensor(key(weight.name, part)).to(weight.device) for part in parts_in(weight)}
        except (OSError, SafetensorError) as error:
            raise CacheError(f"{self.reader.path}: cannot be read: {error}") from error

    def replace(self, weight: FourBitWeight, parts: Mapping[str, torch.Tensor]) -> None:
        raise AdapterError(
            f"{weight.name}: this `lora.init_lora_weights` changes the base, and layers on file cannot be changed\n"
            "  keep them in memory (memory.layers_on_device, memory.layers_on_host), or use another initialisation"
        )


def parts_in(weight: FourBitWeight) -> Iterable[str]:
    """Names of a weight's parts."""
    return parts_of(weight.shape, weight.four_bit)


class Disk:
    """Reads layers from files, beside the computation.

    To the CPU they are read in place. To a GPU a layer goes chunk by chunk: each reader fills a small page-locked
    buffer and sends it on while the others read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._director = ThreadPoolExecutor(1, "qlora-fetch")
        self.readers = ThreadPoolExecutor(READERS, "qlora-read")
        self._staging: queue.Queue[tuple[torch.Tensor, Event]] | None = None

    def read(self, reader: ShardReader, slot: torch.Tensor, lane: Lane, after: Event) -> Future[Event]:
        """Bring a shard into `slot`; the future gives the event of its arrival."""
        if self._device.type == "cpu":
            return self._director.submit(reader.read_into, slot, self.readers)
        if self._staging is None:
            self._staging = queue.Queue()
            for _ in range(READERS):
                self._staging.put((host_buffer(CHUNK, self._device), None))
        return self._director.submit(self._through_staging, reader, slot, lane, after)

    def _through_staging(self, reader: ShardReader, slot: torch.Tensor, lane: Lane, after: Event) -> Event:
        staging = self._staging
        assert staging is not None

        def pass_on(k: int) -> None:
            buffer, sent = staging.get()
            try:
                if sent is not None:
                    sent.synchronize()
                n = reader.read_chunk(k, buffer)
                sent = lane.copy(slot[k * CHUNK : k * CHUNK + n], buffer[:n], after)
            finally:
                staging.put((buffer, sent))

        list(self.readers.map(pass_on, range(len(reader.chunks()))))
        return lane.mark()


def spread(counts: Mapping[str, int]) -> list[str]:
    """A tier for each layer, evenly mixed: what must be fetched then has others to hide behind.

    counts  how many layers each tier has
    """
    places = [((k + 0.5) / count, tier) for tier, count in counts.items() for k in range(count)]
    return [tier for _, tier in sorted(places, key=lambda place: place[0])]
