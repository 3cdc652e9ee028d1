"""A decoder cut into prologue, layers and epilogue, with no architecture named.

The model's own forward does both ends. While it runs, stand-ins take the places of its decoder layers: they record
what this architecture hands to each layer (masks, rotary tables, caches that are None) and pass the hidden state on.
The last one either ends the run there (prologue), or answers with a hidden state of our choosing, so that what follows
the layers (final norm, head, soft caps) runs on that (epilogue).

Where the layers are is found by watching one real forward, not by a name, and a cut is believed only after it gave the
logits of the uncut model. `cut` says why where it does not.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from qlora.model.batch import Batch

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class CannotCut(Exception):
    """Why a model cannot be run layer by layer."""


class _Arrived(Exception):
    """The model's forward got to the last layer."""


class _StandIn(nn.Module):
    """Stands where a decoder layer was."""

    def __init__(self, layer: nn.Module, is_last: bool, gives_tuple: bool) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not as a submodule: nothing that walks the model may find it here
        self._is_last, self._gives_tuple = is_last, gives_tuple
        self.answer: torch.Tensor | None = None
        self.received: torch.Tensor | None = None
        self.arguments: Arguments | None = None

    def __getattr__(self, name: str) -> Any:
        # Some models read facts off their layers (`layer.attention_type`), so what is not ours is the layer's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.answer is not None:
            hidden = self.answer
        else:
            self.received, self.arguments = hidden, (args, kwargs)
            if self._is_last:
                raise _Arrived
        return (hidden,) if self._gives_tuple else hidden

    def forget(self) -> None:
        self.answer = self.received = self.arguments = None


@dataclass(frozen=True, slots=True)
class Entry:
    """How one micro-batch enters the layers.

    hidden     [B, T, hidden_size]   what layer 0 receives
    arguments  what the model hands to each layer besides, as (args, kwargs)
    """

    hidden: torch.Tensor
    arguments: list[Arguments]


class Blocks:
    """A causal LM whose layers run one at a time."""

    def __init__(self, model: PreTrainedModel, path: str, gives_tuple: bool) -> None:
        """path: where in `model` the ModuleList of layers is; gives_tuple: whether a layer answers with a tuple."""
        self.model, self.path = model, path
        layers = model.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)
        self.layers, last = layers, len(layers) - 1
        self._stand_ins = [_StandIn(layer, i == last, gives_tuple) for i, layer in enumerate(layers)]
        self.isolates_documents = False  # whether packed documents do not see each other; `cut` finds out

    def __len__(self) -> int:
        return len(self.layers)

    def prologue(self, batch: Batch) -> Entry:
        """Run what comes before layer 0: embedding, masks, rotary tables."""
        with self._stood_in(), contextlib.suppress(_Arrived):
            self.model(**inputs_of(self.model, batch))
            raise CannotCut("its forward did not come to the last layer")
        hidden, arguments = self._stand_ins[0].received, [stand_in.arguments for stand_in in self._stand_ins]
        assert hidden is not None
        entry = Entry(hidden, [each for each in arguments if each is not None])
        for stand_in in self._stand_ins:
            stand_in.forget()
        return entry

    def layer(self, i: int, hidden: torch.Tensor, entry: Entry) -> torch.Tensor:
        """Run layer i: [B, T, hidden_size] in, the same shape out."""
        args, kwargs = entry.arguments[i]
        out = self.layers[i](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def epilogue(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run what comes after the last layer: [N, hidden_size] in, logits [N, vocab_size] out.

        What follows the layers treats each token alone, so the N tokens may be any selection, in any order. They travel
        as N sequences of one token: no mask between them, and no position beyond what the model knows.
        """
        hidden = hidden[:, None]
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with self._stood_in():
            for stand_in in self._stand_ins:
                stand_in.answer = hidden
            logits = self.model(input_ids=ids, use_cache=False).logits
        for stand_in in self._stand_ins:
            stand_in.forget()
        return logits[:, 0]

    @contextmanager
    def _stood_in(self) -> Iterator[None]:
        self.model.set_submodule(self.path, nn.ModuleList(self._stand_ins))
        try:
            yield
        finally:
            self.model.set_submodule(self.path, self.layers)


def inputs_of(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """A micro-batch as keyword arguments of the model's forward."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = batch.position_ids
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    return inputs


def cut(model: PreTrainedModel) -> Blocks:
    """Cut a causal LM into blocks, and prove the cut on a short input.

    Raises CannotCut with the reason.
    """
    was_training = model.training
    model.eval()
    try:
        probe = _probe(model)
        with torch.no_grad():
            path, gives_tuple, expected = _watch(model, probe)
            blocks = Blocks(model, path, gives_tuple)
            logits = _logits(blocks, probe)
        if not _alike(logits, expected):
            raise CannotCut(f"run one at a time, the layers in `{path}` do not give the model's own logits")
        with torch.enable_grad():
            entry = blocks.prologue(probe)
        if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(entry.arguments)):
            raise CannotCut("what it hands to its layers beside the hidden state is itself trained")
        blocks.isolates_documents = _isolates_documents(blocks, probe)
        return blocks
    finally:
        model.train(was_training)


def _probe(model: PreTrainedModel, tokens: int = 8) -> Batch:
    """A packed micro-batch of two documents with unlike tokens."""
    vocab: Any = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(2 * tokens, device=model.device) * 7919 + 13) % vocab
    positions = torch.arange(tokens, device=model.device).repeat(2)
    return Batch(ids[None], positions[None], ids[None].clone())


def _watch(model: PreTrainedModel, probe: Batch) -> tuple[str, bool, torch.Tensor]:
    """Where the layers are, whether they answer with tuples, and the logits, from one forward of the whole model."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    calls: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        calls.setdefault(module, []).append((args[0] if args else None, out))

    hooks = [m.register_forward_hook(note) for m in {m for layers in lists.values() for m in layers}]
    try:
        expected = model(**inputs_of(model, probe)).logits[0]
    finally:
        for hook in hooks:
            hook.remove()

    def first(out: Any) -> Any:
        return out[0] if isinstance(out, tuple) else out

    chains = []
    for name, layers in lists.items():
        if all(len(calls.get(m, ())) == 1 for m in layers):
            ins, outs = zip(*(calls[m][0] for m in layers), strict=True)
            linked = all(first(out) is following for out, following in zip(outs, ins[1:], strict=False))
            hidden = isinstance(ins[0], torch.Tensor) and ins[0].shape[:2] == probe.input_ids.shape
            if linked and hidden and first(outs[-1]).shape == ins[0].shape:
                chains.append((len(layers), -name.count("."), name, isinstance(outs[0], tuple)))
    if not chains:
        raise CannotCut("no list of layers passes the hidden state from each to the next")
    *_, path, gives_tuple = max(chains)
    return path, gives_tuple, expected


def _logits(blocks: Blocks, batch: Batch) -> torch.Tensor:
    """Logits [B*T, vocab_size] by the cut model, with a look at what its layers pass to each other on the side."""
    entry = blocks.prologue(batch)
    before = _tensors_of(entry)
    hidden = entry.hidden
    for i in range(len(blocks)):
        hidden = blocks.layer(i, hidden, entry)
    if _tensors_of(entry) != before:
        raise CannotCut("its layers hand each other tensors beside the hidden state")
    return blocks.epilogue(hidden.flatten(0, 1))


def _tensors_of(entry: Entry) -> list[tuple[int, int]]:
    leaves = tree_leaves([[args, kwargs] for args, kwargs in entry.arguments])
    return [(id(leaf), leaf._version) for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    # The same sums in another shape: a few roundings apart at most, where a wrong cut is far off.
    tolerance = 1e-4 if a.dtype == torch.float32 else 3e-2
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@torch.no_grad()
def _isolates_documents(blocks: Blocks, probe: Batch) -> bool:
    """Whether other tokens in the first document leave the second one's logits alone."""
    half = probe.tokens // 2
    ids = probe.input_ids.clone()
    ids[:, :half] = ids[:, :half].flip(1)
    other = Batch(ids, probe.position_ids, ids)
    return _alike(_logits(blocks, other)[half:], _logits(blocks, probe)[half:])
