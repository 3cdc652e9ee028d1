"""A layer's graph that lasts from its forward to its backward, and holds none of the layer's weights meanwhile.

Autograd saves whatever the backward will ask for, and weights are part of it: dense ones, which stand only while the
layer is visited, in memory that the next layer takes; and trained ones, which may be on the device no longer than that.
Both are there again, with the same values, when the layer is visited for its backward. So of these a graph remembers
where to find them, and of all others what they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from qlora.model.nf4 import four_bit_weights

Weight = Callable[[], torch.Tensor]  # gives it as it is now


@dataclass(frozen=True, slots=True)
class _Place:
    """A view of a weight, to be taken when it is asked for. offset: of its first element, from the weight's."""

    weight: Weight
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def view(self) -> torch.Tensor:
        weight = self.weight()
        return weight.as_strided(self.shape, self.stride, weight.storage_offset() + self.offset)


@contextmanager
def without_weights(layer: nn.Module) -> Iterator[None]:
    """Let a graph that is made inside hold none of `layer`'s four-bit and trained weights.

    The layer must be visited here, and visited again around the graph's backward.
    """
    weights: list[Weight] = [weight.dense for weight in four_bit_weights(layer)]
    weights += [parameter.detach for parameter in layer.parameters() if parameter.requires_grad]
    # On a GPU all dense weights are in one storage, so there is more to a place than that.
    by_storage: defaultdict[torch.UntypedStorage, list[tuple[Weight, torch.dtype, range]]] = defaultdict(list)
    for weight in weights:
        by_storage[weight().untyped_storage()].append((weight, weight().dtype, _elements(weight())))

    def pack(tensor: torch.Tensor) -> torch.Tensor | _Place:
        first = int(tensor.storage_offset())
        for weight, dtype, elements in by_storage.get(tensor.untyped_storage(), ()):
            if tensor.dtype == dtype and first in elements:
                return _Place(weight, tensor.shape, tensor.stride(), elements.index(first))
        return tensor.detach()  # itself, where a node saves its own output, would be a cycle

    def unpack(packed: torch.Tensor | _Place) -> torch.Tensor:
        return packed.view() if isinstance(packed, _Place) else packed

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        by_storage.clear()  # the graph may keep `pack`, and with it every storage


def _elements(tensor: torch.Tensor) -> range:
    """Which of its storage's."""
    return range(tensor.storage_offset(), tensor.storage_offset() + tensor.numel())
