"""Where the frozen layers live, and how one is made ready for the step.

The step asks for a layer, uses it for all its micro-batches, and lets it go. Here every layer is already on the device,
and to make it ready is to expand its four-bit weights; a host or file tier fetches first, behind the same two methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

from torch import nn

from qlora.model.nf4 import four_bit_weights


class Residency(Protocol):
    """What the step and the evaluation need of a tier."""

    visits: int  # layers made ready so far; 2 L - 1 an optimizer step, whatever the number of micro-batches
    dense_bytes: int  # what `all_dense` takes more

    @contextmanager
    def visit(self, i: int) -> Iterator[None]:
        """Layer i is on the device and dense while the context lasts."""
        ...

    @contextmanager
    def all_dense(self) -> Iterator[None]:
        """Every layer is dense while the context lasts: for generation, which passes through all of them a token."""
        ...


class Resident:
    """All layers on the device."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self._weights = [four_bit_weights(layer) for layer in layers]
        self.dense_bytes = sum(w.shape.numel() * w.four_bit.compute_dtype.itemsize for ws in self._weights for w in ws)
        self.visits = 0

    @contextmanager
    def visit(self, i: int) -> Iterator[None]:
        self.visits += 1
        with ExitStack() as stack:
            for weight in self._weights[i]:
                stack.enter_context(weight.standing())
            yield

    @contextmanager
    def all_dense(self) -> Iterator[None]:
        with ExitStack() as stack:
            for weights in self._weights:
                for weight in weights:
                    stack.enter_context(weight.standing())
            yield
