"""The two ends of a model on the host: of the embedding only the looked-up rows travel, of the head a chunk at a time.

In 16 bits each end of a 70B model takes 2.1 GB, for one lookup and one product a micro-batch. So both can rest in host
memory. The embedding looks up where its weight is, and its rows go to the device. The head's weight comes in chunks of
columns (tokens of the vocabulary), the next on its way while this one is multiplied; `loss.streamed_head_loss` needs
no more than that. Tied ends are one tensor here as everywhere.

The model's own forward computes all of it: the embedding gets hooks, and a stand-in takes the head's place for as long
as a chunk's logits are made. What a model does to its logits (soft cap, scale) it must do to each of them alone, or a
chunk would not be a part of the whole; that is tried before it is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qlora.model.batch import Batch
from qlora.model.blocks import Blocks
from qlora.model.transfer import HOST, Event, Lane, host_buffer

Epilogue = Callable[[torch.Tensor], torch.Tensor]


class CannotStayOnHost(Exception):
    """Why an end of a model cannot live on the host."""


def ends_to_host(blocks: Blocks, device: torch.device, columns: int) -> HeadOnHost:
    """Move embedding and head to the host. Adapters must be on the model already.

    device   where the layers compute
    columns  tokens of the vocabulary whose part of the head is on the device at a time (twice: one computes, one comes)

    Raises CannotStayOnHost with the reason, before anything moved, and HostMemoryError.
    """
    embedding, head = _embedding(blocks.model), HeadOnHost(blocks, device, columns)
    hooks = _route(embedding, device)
    try:
        head.prove()
    except CannotStayOnHost:
        for hook in hooks:
            hook.remove()
        raise
    head.move()
    _move(embedding)
    return head


def embedding_to_host(model: PreTrainedModel, device: torch.device) -> None:
    """Move the embedding alone to the host, where it is not tied to the head.

    Raises CannotStayOnHost with the reason.
    """
    embedding = _embedding(model)
    head: Any = model.get_output_embeddings()
    if getattr(head, "weight", None) is embedding.weight:
        raise CannotStayOnHost("the embedding is tied to the head, so they go together")
    _route(embedding, device)
    _move(embedding)


def _embedding(model: PreTrainedModel) -> nn.Embedding:
    embedding: Any = model.get_input_embeddings()
    _refuse_trained(embedding, "embedding")
    if not isinstance(embedding, nn.Embedding):
        raise CannotStayOnHost(f"the embedding is a {type(embedding).__name__}, not an nn.Embedding")
    return embedding


def _route(embedding: nn.Embedding, device: torch.device) -> list[RemovableHandle]:
    """Let ids go to the embedding's weight, wherever it is, and its rows to the device."""

    def ids_to_weight(module: Any, args: Any, kwargs: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda ids: ids.to(module.weight.device), (args, kwargs))

    def rows_to_device(module: nn.Module, args: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(device, non_blocking=True)

    before = embedding.register_forward_pre_hook(ids_to_weight, with_kwargs=True)
    return [before, embedding.register_forward_hook(rows_to_device)]


def _move(embedding: nn.Embedding) -> None:
    embedding.weight.data = embedding.weight.data.to(HOST)  # the parameter remains, so what is tied to it remains tied
    for name, buffer in embedding.named_buffers():  # some scale their rows themselves
        setattr(embedding, name, buffer.to(HOST))


class _StandIn(nn.Module):
    """Stands where the head was."""

    def __init__(self, weight: torch.Tensor, linear: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight, self._linear = weight, linear  # plain tensors: nothing that walks the model finds a parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x)


class HeadOnHost:
    """A head whose weight [V, hidden_size] rests on the host and passes over the device in chunks of its rows."""

    def __init__(self, blocks: Blocks, device: torch.device, columns: int) -> None:
        """Make the two buffers; the head itself is not touched before `move`. Arguments as of `ends_to_host`.

        Raises CannotStayOnHost where it is not a plain frozen linear layer.
        """
        head: Any = blocks.model.get_output_embeddings()
        if head is None:
            raise CannotStayOnHost("the model does not say where its head is")
        _refuse_trained(head, "head")
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
            raise CannotStayOnHost(f"the head is a {type(head).__name__}, not a plain nn.Linear")
        self.head, self._blocks, self._device = head, blocks, device
        self._path = next(name for name, module in blocks.model.named_modules() if module is head)
        vocab, width = head.weight.shape
        columns = min(columns, vocab)
        self.chunks = [slice(start, min(start + columns, vocab)) for start in range(0, vocab, columns)]
        self._lane = Lane(device)
        self._buffers = [torch.empty(columns, width, dtype=head.weight.dtype, device=device) for _ in range(2)]

    def move(self) -> None:
        """Move the weight to the host, page-locked; what is tied to it goes along.

        Raises HostMemoryError.
        """
        if self._device == HOST:
            return
        weight = self.head.weight
        at_rest = host_buffer(weight.nbytes, self._device).view(weight.dtype).view(weight.shape)
        weight.data = at_rest.copy_(weight.data)

    def tokens_at_once(self, chunk: int) -> int:
        """Tokens that have as many logits in one chunk of columns as `chunk` tokens have in the whole vocabulary."""
        return chunk * self.chunks[-1].stop // self.chunks[0].stop

    def sweep(self) -> Iterator[tuple[slice, Epilogue]]:
        """Pass over the vocabulary once: each chunk of columns, with the epilogue that gives their logits alone.

        An epilogue ([N, hidden_size] -> logits [N, columns of the chunk]) works, and goes backward, only until the
        next one is asked for: its weight lies in one of two buffers that take turns.
        """
        for columns, weight, bias in self._passing():
            stand_in = _StandIn(weight, partial(F.linear, weight=weight, bias=bias))
            yield columns, partial(self._epilogue, stand_in)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The model's own forward gives all its logits while the context lasts: for generation, one sweep a token."""
        with self._in_place(_StandIn(self.head.weight.detach(), self._all_columns)):
            yield

    @torch.no_grad()
    def prove(self) -> None:
        """Try that the chunks' logits are parts of the whole.

        Raises CannotStayOnHost where they are not.
        """
        ids = torch.arange(3, device=self._device)[None]
        probe = self._blocks.prologue(Batch(ids, ids, ids, documents=((3,),))).hidden.flatten(0, 1)
        try:
            with self.whole():
                expected = self._blocks.epilogue(probe)
            found = torch.cat([epilogue(probe) for _, epilogue in self.sweep()], dim=1)
        except (RuntimeError, ValueError, IndexError) as error:
            raise CannotStayOnHost(f"the head cannot be chunked: {error}") from error
        # The same sums, so roundings apart at most. Against the median: a masked logit (-inf, or nearly) has no say.
        tolerance = 1e-4 if found.dtype == torch.float32 else 3e-2
        atol = tolerance * float(expected.abs().median())
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=tolerance, atol=atol):
            raise CannotStayOnHost("the head cannot be chunked: what the model makes of a logit depends on the others")

    def _passing(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
        """Each chunk with its weight, on the device, and its bias; the next one is on its way meanwhile."""
        lane, weight, bias = self._lane, self.head.weight.detach(), self.head.bias
        free = [lane.now()] * 2  # event by buffer: its last reader is done

        def fetch(i: int) -> tuple[torch.Tensor, Event]:
            columns = self.chunks[i]
            buffer = self._buffers[i % 2][: columns.stop - columns.start]
            return buffer, lane.copy(buffer, weight[columns], after=free[i % 2])

        coming = fetch(0)
        for i, columns in enumerate(self.chunks):
            here, arrived = coming
            if i + 1 < len(self.chunks):
                coming = fetch(i + 1)
            lane.follow(arrived)
            yield columns, here, None if bias is None else bias[columns].to(self._device)
            free[i % 2] = lane.now()

    def _all_columns(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.linear(x, weight, bias) for _, weight, bias in self._passing()], dim=-1)

    def _epilogue(self, stand_in: _StandIn, hidden: torch.Tensor) -> torch.Tensor:
        with self._in_place(stand_in):
            return self._blocks.epilogue(hidden)

    @contextmanager
    def _in_place(self, stand_in: _StandIn) -> Iterator[None]:
        model = self._blocks.model
        model.set_submodule(self._path, stand_in)
        try:
            yield
        finally:
            model.set_submodule(self._path, self.head)


def _refuse_trained(module: nn.Module, name: str) -> None:
    if any(parameter.requires_grad for parameter in module.parameters()):
        raise CannotStayOnHost(
            f"the {name} is trained (method: full, or named in lora.modules_to_save or lora.target_modules)"
        )
