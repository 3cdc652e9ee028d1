"""How a frozen layer is made ready for the step, wherever it lives.

While the step visits a layer its weights are dense. They are expanded as the visit begins, from the device or from the
slot, where a layer from elsewhere arrives. Then the slot is free again, and the next layer's bytes are on their way
into it while this one computes: one slot is enough, and nothing waits that need not. Frozen weights are never copied
back.

One slot and one set of dense buffers serve all layers, and are allocated once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from qlora.errors import ModelError
from qlora.model.homes import LayerHome, OnHost, key, layout_of, padded, parts_in
from qlora.model.nf4 import four_bit_weights
from qlora.model.transfer import HOST, Event, Lane, host_buffer


class Residency:
    """The layers of a model, wherever they live.

    visits   layers made ready so far; 2 L - 1 an optimizer step, whatever the number of micro-batches
    fetches  how many of them had to be brought to the device
    waited   seconds that the host waited for their bytes
    watch    entered around each wait of the computation for a layer, by whoever wants to time that
    """

    def __init__(self, layers: Iterable[nn.Module], device: torch.device) -> None:
        self.layers, self.device = list(layers), device
        self._weights = [four_bit_weights(layer) for layer in self.layers]
        self._homes = [self._home_of(i) for i in range(len(self.layers))]
        self.dense_nbytes = sum(w.dense_nbytes for weights in self._weights for w in weights)
        self.visits = self.fetches = 0
        self.waited = 0.0
        self.watch: Callable[[], AbstractContextManager[object]] = nullcontext
        self._lane = Lane(device)
        self._slot: torch.Tensor | None = None
        self._views: dict[int, Mapping[str, torch.Tensor]] = {}  # of each layer's parts, while they are in the slot
        self._slot_free: Event = None
        self._arriving: tuple[int, Callable[[], Event]] | None = None
        self._dense: torch.Tensor | None = None

    def _home_of(self, i: int) -> LayerHome | None:
        homes: set[Any] = {weight.home for weight in self._weights[i]}
        if len(homes) > 1:
            raise ModelError(f"layer {i} of the model is not one of the layers that memory.layers_on_device places")
        return homes.pop() if homes else None

    @property
    def tiers(self) -> dict[str, int]:
        """How many layers live where."""
        names = [home.tier if home else "device" for home in self._homes]
        return {tier: names.count(tier) for tier in ("device", "host", "file")}

    def buffers(self) -> list[torch.Tensor]:
        """What all layers share, as far as it is there: the slot, the dense weights."""
        return [buffer for buffer in (self._slot, self._dense) if buffer is not None]

    def evict(self, count: int) -> int:
        """Move up to `count` layers from the device to the host, spread over the model; returns how many.

        Raises HostMemoryError.
        """
        here = [i for i, weights in enumerate(self._weights) if weights and self._homes[i] is None]
        chosen = here[:: max(len(here) // max(count, 1), 1)][:count]
        for i in chosen:
            weights = self._weights[i]
            layout = layout_of({weight.name: weight.shape for weight in weights}, weights[0].four_bit)
            home = OnHost(layout, host_buffer(padded(layout.nbytes), self.device))
            for weight in weights:
                assert weight.held is not None
                home.replace(weight, weight.held)
                weight.held, weight.home = None, home
            self._homes[i] = home
        self._arrived()  # or it would arrive in memory that is given up
        self._arriving = self._slot = None  # a layer that moved may be larger than those that came so far
        self._views.clear()
        return len(chosen)

    def route(self, order: Sequence[int]) -> Iterator[AbstractContextManager[None]]:
        """A visit of each layer in `order`, to be entered one after the other: what comes next is then known."""
        for at, i in enumerate(order):
            yield self.visit(i, order[at + 1 :])

    @contextmanager
    def visit(self, i: int, ahead: Iterable[int] = ()) -> Iterator[None]:
        """Layer i is on the device and dense while the context lasts.

        ahead  the layers that follow: the next one that lives elsewhere is brought meanwhile
        """
        self.visits += 1
        with ExitStack() as stack:
            with self._parts_held(i):
                for weight, buffer in zip(self._weights[i], self._buffers(i), strict=True):
                    stack.enter_context(weight.standing(buffer))
            following = next((j for j in ahead if self._homes[j] is not None), None)
            if following is not None:
                self._fetch(following)
            yield

    @contextmanager
    def _parts_held(self, i: int) -> Iterator[None]:
        """The four-bit parts of layer i are on the device while the context lasts."""
        home = self._homes[i]
        if home is None:
            yield
            return
        with self.watch():
            self._fetch(i)
            self._arrived()
        assert self._slot is not None
        views = self._views.get(i)
        if views is None:
            views = self._views[i] = home.layout.views(self._slot)
        try:
            for weight in self._weights[i]:
                weight.held = {part: views[key(weight.name, part)] for part in parts_in(weight)}
            yield
        finally:
            for weight in self._weights[i]:
                weight.held = None
            self._slot_free = self._lane.now()

    def _fetch(self, i: int) -> None:
        """Begin to bring layer i into the slot, if it is not there or on its way."""
        if self._arriving is not None and self._arriving[0] == i:
            return
        if self._slot is None:
            largest = max(padded(home.layout.nbytes) for home in self._homes if home is not None)
            self._slot = _slot(largest, self.device)
            self._slot_free = self._lane.now()  # its memory may have been another's, whose computation still runs
        self._arrived()  # what nobody came for must not arrive after this one
        self._arriving = None
        home = self._homes[i]
        assert home is not None
        self._arriving = (i, home.fetch(self._slot, self._lane, self._slot_free))
        self.fetches += 1

    def _arrived(self) -> None:
        """Let the computation go on behind the arrival of what is on its way; wait where the host must."""
        if self._arriving is None:
            return
        started = time.perf_counter()
        try:
            self._lane.follow(self._arriving[1]())
        except BaseException:
            self._arriving = None
            raise
        self.waited += time.perf_counter() - started

    def _buffers(self, i: int) -> list[torch.Tensor | None]:
        """Where the dense weights of layer i stand."""
        weights = self._weights[i]
        if self.device == HOST:  # its allocator leaves no holes that could not be used otherwise
            return [None] * len(weights)
        if self._dense is None:
            largest = max(sum(padded(w.dense_nbytes) for w in ws) for ws in self._weights)
            self._dense = torch.empty(largest, dtype=torch.uint8, device=self.device)
        starts = [sum(padded(w.dense_nbytes) for w in weights[:n]) for n in range(len(weights))]
        return [
            self._dense[start : start + w.dense_nbytes].view(w.four_bit.compute_dtype).view(w.shape)
            for start, w in zip(starts, weights, strict=True)
        ]

    @contextmanager
    def whole_model(self, room: float) -> Iterator[None]:
        """Any forward of the model finds its layers ready while the context lasts: for generation, which passes through
        all of them for each token.

        room  bytes that may be taken: all layers are dense at once where they fit, else each while it runs
        """
        with ExitStack() as stack:
            if self.dense_nbytes <= room:
                for i, weights in enumerate(self._weights):
                    with self._parts_held(i):
                        for weight in weights:
                            stack.enter_context(weight.standing())
            else:
                for i in range(len(self.layers)):
                    stack.enter_context(self._visited_when_run(i))
            yield

    @contextmanager
    def _visited_when_run(self, i: int) -> Iterator[None]:
        visit = ExitStack()
        ahead = [*range(i + 1, len(self.layers)), *range(i)]
        hooks = [
            self.layers[i].register_forward_pre_hook(lambda *_: visit.enter_context(self.visit(i, ahead))),
            self.layers[i].register_forward_hook(lambda *_: visit.close(), always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            visit.close()


def _slot(nbytes: int, device: torch.device) -> torch.Tensor:
    return host_buffer(nbytes, device) if device == HOST else torch.empty(nbytes, dtype=torch.uint8, device=device)
