"""Trained weights that live on the host: a layer's move to the device for its visit, and their gradients come back.

The optimizer, its state and the clipping then work on the host, over whole gradients, so nothing of them is
approximate. An adapter of rank 64 on all linear layers of a 70B model, 829 M parameters, would take 8.3 GB with its
gradients and an 8-bit optimizer's state; one layer's weights and gradients take 83 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qlora.model.transfer import HOST


class Masters:
    """The trained parameters of a model's layers, at rest on the host."""

    def __init__(self, layers: Iterable[nn.Module], device: torch.device) -> None:
        """Move them there. device: where the layers compute."""
        self._device = device
        self._parameters = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
        for parameter in (p for inside in self._parameters for p in inside):
            parameter.data = parameter.data.to(HOST)

    @contextmanager
    def visit(self, i: int) -> Iterator[None]:
        """Layer i's trained parameters are on the device while the context lasts.

        What gradients they get there is added to those on the host. Micro-batches are summed on the device first, in
        their order, as without this.
        """
        at_rest = [(p, p.data, p.grad) for p in self._parameters[i]]
        for parameter, master, _ in at_rest:
            parameter.grad = None
            parameter.data = master.to(self._device, copy=True)
        try:
            yield
        finally:
            for parameter, master, before in at_rest:
                found = None if parameter.grad is None else parameter.grad.to(HOST)
                parameter.grad = None
                parameter.data = master
                parameter.grad = found if before is None else before if found is None else before.add_(found)
