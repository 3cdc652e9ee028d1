"""A decoder cut into prologue, layers and epilogue, with no architecture named.

The model's own forward does both ends. While it runs, stand-ins take the places of its decoder layers: they record
what this architecture hands to each layer (masks, rotary tables, caches that are None) and pass the hidden state on.
The last one either ends the run there (prologue), or answers with a hidden state of our choosing, so that what follows
the layers (final norm, head, soft caps) runs on that (epilogue).

Where the layers are is found by watching one real forward, not by a name, and a cut is believed only after it gave the
logits of the uncut model. `cut` says why where it does not. The same pass proves attention without masks (attention.py)
and layers run in tiles (tiles.py); a model that fails the first keeps its own attention, one that fails the second is
run untiled.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from qlora.model import attention
from qlora.model.attention import Call, Documents, Unsupported, driving
from qlora.model.batch import Batch
from qlora.model.nf4 import standing
from qlora.model.tiles import Arguments, CannotTile, TiledLayer, token_axes


class CannotCut(Exception):
    """Why a model cannot be run layer by layer."""


class _Arrived(Exception):
    """The model's forward got to the last layer."""


@dataclass(slots=True)
class _Passing:
    """What the stand-ins of a model tell each other. answer: what takes the place of every layer's output, if any."""

    answer: torch.Tensor | None = None


class _StandIn(nn.Module):
    """Stands where a decoder layer was."""

    def __init__(self, layer: nn.Module, is_last: bool, gives_tuple: bool, passing: _Passing) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not as a submodule: nothing that walks the model may find it here
        self._is_last, self._gives_tuple, self._passing = is_last, gives_tuple, passing
        self.received: torch.Tensor | None = None
        self.arguments: Arguments | None = None

    def __getattr__(self, name: str) -> Any:
        # Some models read facts off their layers (`layer.attention_type`), so what is not ours is the layer's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._passing.answer is not None:
            hidden = self._passing.answer
        else:
            self.received, self.arguments = hidden, (args, kwargs)
            if self._is_last:
                raise _Arrived
        return (hidden,) if self._gives_tuple else hidden

    def forget(self) -> None:
        self.received = self.arguments = None


@dataclass(frozen=True, slots=True)
class Entry:
    """How one micro-batch enters the layers.

    hidden     [B, T, hidden_size]   what layer 0 receives
    arguments  what the model hands to each layer besides, as (args, kwargs)
    documents  lengths of the documents in each row
    windows    of the masks that were asked for, where the model has our attention
    """

    hidden: torch.Tensor
    arguments: list[Arguments]
    documents: Documents
    windows: frozenset[int | None]

    def without_hidden(self) -> Entry:
        """The same, with nothing in the place of the hidden state: for who keeps that elsewhere."""
        return replace(self, hidden=self.hidden.new_empty(0))

    def attend(self, call: Call) -> torch.Tensor:
        """Attention in this micro-batch."""
        return attention.attend(call, self.documents, self.windows)


class Blocks:
    """A causal LM whose layers run one at a time."""

    def __init__(self, model: PreTrainedModel, path: str, gives_tuple: bool) -> None:
        """path: where in `model` the ModuleList of layers is; gives_tuple: whether a layer answers with a tuple."""
        self.model, self.path = model, path
        layers = model.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)
        self.layers, last = layers, len(layers) - 1
        self._gives_tuple, self._passing = gives_tuple, _Passing()
        self._stand_ins = [_StandIn(layer, i == last, gives_tuple, self._passing) for i, layer in enumerate(layers)]
        self._in_their_place = nn.ModuleList(self._stand_ins)  # once: the head and loss ask for it many times a step
        self._takes = inspect.signature(model.forward).parameters.keys()
        self.isolates_documents = False  # whether packed documents do not see each other; `cut` finds out
        self._axes: list[list[int | None]] = []  # the tokens' axis of each argument of each layer; `cut` finds out
        self._no_tiles = "it was not tried"  # why there are none, or nothing; `cut` finds out
        self._tile_tokens: int | None = None

    def __len__(self) -> int:
        return len(self.layers)

    def again(self, model: PreTrainedModel) -> Blocks:
        """The same cut of a model of the same make, whose further layers are like the last. Nothing is proven anew."""
        model.set_attn_implementation(str(self.model.config._attn_implementation))
        blocks = Blocks(model, self.path, self._gives_tuple)
        blocks.isolates_documents, blocks._no_tiles = self.isolates_documents, self._no_tiles
        blocks._axes = (self._axes + self._axes[-1:] * len(blocks))[: len(blocks)]
        return blocks

    @property
    def can_tile(self) -> bool:
        """Whether layers can be run a tile of tokens at a time."""
        return not self._no_tiles

    @property
    def tile_tokens(self) -> int | None:
        """Tokens, over all rows, of a tile of a layer; None: a layer is run in one piece.

        In tiles, the gradient given to a layer's backward is overwritten; see tiles.py. Raises CannotCut where layers
        cannot be tiled.
        """
        return self._tile_tokens

    @tile_tokens.setter
    def tile_tokens(self, tokens: int | None) -> None:
        if tokens is not None and not self.can_tile:
            raise CannotCut(f"its layers cannot be run in tiles: {self._no_tiles}")
        self._tile_tokens = tokens

    def prologue(self, batch: Batch) -> Entry:
        """Run what comes before layer 0: embedding, masks, rotary tables."""
        with self._stood_in(), driving(_no_attention) as windows, contextlib.suppress(_Arrived):
            self.model(**inputs_of(self.model, batch))
            raise CannotCut("its forward did not come to the last layer")
        hidden, arguments = self._stand_ins[0].received, [stand_in.arguments for stand_in in self._stand_ins]
        assert hidden is not None
        given = [each for each in arguments if each is not None]
        entry = Entry(hidden, given, batch.documents, frozenset(windows))
        for stand_in in self._stand_ins:
            stand_in.forget()
        return entry

    def layer(self, i: int, hidden: torch.Tensor, entry: Entry, wanted: bool = True) -> torch.Tensor:
        """Run layer i: [B, T, hidden_size] in, the same shape out.

        wanted  False: only the backward of the result is. In tiles, its values are then not computed
        """
        tile = self._tile_tokens
        if tile is not None and tile < hidden.shape[:2].numel():
            return self._tiled(i, entry, max(tile // hidden.shape[0], 1))(hidden, wanted)
        args, kwargs = entry.arguments[i]
        with driving(entry.attend):
            out = self.layers[i](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _tiled(self, i: int, entry: Entry, tile: int) -> TiledLayer:
        return TiledLayer(self.layers[i], entry.arguments[i], self._axes[i], entry.attend, tile)

    def epilogue(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run what comes after the last layer: [N, hidden_size] in, logits [N, vocab_size] out.

        What follows the layers treats each token alone, so the N tokens may be any selection, in any order. They travel
        as N sequences of one token: no mask between them, and no position beyond what the model knows.
        """
        hidden = hidden[:, None]
        self._passing.answer = hidden
        try:
            with self._stood_in(), driving(_no_attention):  # who drives, makes no mask
                return self.model(**self._nothing_in_front_of(hidden), use_cache=False).logits[:, 0]
        finally:
            self._passing.answer = None

    def _nothing_in_front_of(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        # What enters does not matter. Embedded zeros cost no lookup, which counts where the embedding is on the host.
        if "inputs_embeds" in self._takes:
            width = _shape_of_embedding(self.model)[1]
            inputs = {"inputs_embeds": hidden.new_zeros(*hidden.shape[:2], width)}
        else:
            inputs = {"input_ids": torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)}
        if "attention_mask" in self._takes:
            # Without one, transformers looks for packed documents, and the host waits for what the device finds.
            inputs["attention_mask"] = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return inputs

    @contextmanager
    def _stood_in(self) -> Iterator[None]:
        self.model.set_submodule(self.path, self._in_their_place)
        try:
            yield
        finally:
            self.model.set_submodule(self.path, self.layers)


def _no_attention(call: Call) -> torch.Tensor:
    raise Unsupported("it attends before its layers")


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

    A model with stock `sdpa` attention is switched to attention without masks, where it proves to be the same. The
    model's layers are passed twice: once whole, once in blocks.

    Raises CannotCut with the reason.
    """
    was_training, implementation = model.training, model.config._attn_implementation
    model.eval()
    try:
        probe, first = _probe(model)
        with torch.no_grad():
            path, gives_tuple, expected = _watch(model, probe)
            # FlashAttention knows documents and windows, and nothing else.
            if implementation in ("sdpa", attention.NAME) and model._supports_flash_attn:
                model.set_attn_implementation(attention.NAME)
                try:
                    return _proven(Blocks(model, path, gives_tuple), probe, first, expected)
                except (CannotCut, Unsupported) as reason:
                    model.set_attn_implementation("sdpa")
                    blocks = _proven(Blocks(model, path, gives_tuple), probe, first, expected)
                    blocks._no_tiles = f"attention without masks is not the same for it: {reason}"
                    return blocks
            return _proven(Blocks(model, path, gives_tuple), probe, first, expected)
    finally:
        model.train(was_training)


def _shape_of_embedding(model: PreTrainedModel) -> torch.Size:
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape  # which an adapter's wrapper has too


def _probe(model: PreTrainedModel) -> tuple[Batch, int]:
    """A packed micro-batch of two documents with unlike tokens, and the length of the first."""
    lengths = (13, 11)
    vocab = _shape_of_embedding(model)[0]
    ids = (torch.arange(sum(lengths), device=model.device) * 7919 + 13) % vocab
    positions = torch.cat([torch.arange(n, device=model.device) for n in lengths])
    return Batch(ids[None], positions[None], ids[None].clone(), documents=(lengths,)), lengths[0]


def _watch(model: PreTrainedModel, probe: Batch) -> tuple[str, bool, torch.Tensor]:
    """Where the layers are, whether they answer with tuples, and the logits, from one forward of the whole model."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    calls: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        taken = args[0] if args else None
        if not isinstance(taken, torch.Tensor) or taken.shape[:2] != probe.input_ids.shape:
            taken = out = (
                None  # no layer. What it answers may be large: a four-bit weight, which is a list too, is dense
            )
        calls.setdefault(module, []).append((taken, out))

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
            if linked and ins[0] is not None and first(outs[-1]).shape == ins[0].shape:
                chains.append((len(layers), -name.count("."), name, isinstance(outs[0], tuple)))
    if not chains:
        raise CannotCut("no list of layers passes the hidden state from each to the next")
    *_, path, gives_tuple = max(chains)
    return path, gives_tuple, expected


def _proven(blocks: Blocks, probe: Batch, first: int, expected: torch.Tensor) -> Blocks:
    """The blocks, after they gave `expected`, the model's own logits of the probe, in one pass over the layers.

    A second row, the probe with other tokens in its first document, goes along: it tells whether the second document
    notices. And each layer is run in tiles beside.
    """
    other = probe.input_ids.clone()
    other[:, :first] = other[:, :first].flip(1)
    both = _rows([probe.input_ids, other], probe)
    with torch.enable_grad():
        entry = blocks.prologue(both)
    if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(entry.arguments)):
        raise CannotCut("what it hands to its layers beside the hidden state is itself trained")
    blocks._no_tiles = _find_axes(blocks, both, entry)
    before = _tensors_of(entry)
    hidden = entry.hidden.detach()
    for i, layer in enumerate(blocks.layers):
        with standing(layer):
            following = blocks.layer(i, hidden, entry)
            if _tensors_of(entry) != before:
                raise CannotCut("its layers hand each other tensors beside the hidden state")
            blocks._no_tiles = blocks._no_tiles or _why_no_tiles(blocks, i, hidden, entry, following)
        hidden = following
    logits, changed = blocks.epilogue(hidden.flatten(0, 1)).chunk(2)
    if not _alike(logits, expected):
        raise CannotCut(f"run one at a time, the layers in `{blocks.path}` do not give the model's own logits")
    blocks.isolates_documents = _alike(changed[first:], logits[first:])
    return blocks


def _why_no_tiles(blocks: Blocks, i: int, hidden: torch.Tensor, entry: Entry, expected: torch.Tensor) -> str:
    """Run layer i in tiles; returns why it cannot be, or nothing."""
    try:
        if _alike(blocks._tiled(i, entry, 15)(hidden), expected):
            return ""
        return "a layer in tiles does not give what it gives in one piece"
    except (CannotTile, RuntimeError) as reason:  # torch's complaint about a shape is a reason like another
        return str(reason)


def _rows(ids: list[torch.Tensor], like: Batch) -> Batch:
    rows, n = torch.cat(ids), len(ids)
    return Batch(rows, like.position_ids.repeat(n, 1), rows, documents=like.documents * n)


def _find_axes(blocks: Blocks, batch: Batch, entry: Entry) -> str:
    """Find the tokens' axis in what each layer is handed; returns why there are no tiles, or nothing."""
    if blocks.model.config._attn_implementation != attention.NAME:
        return f"its attention is {blocks.model.config._attn_implementation}"
    ids, positions, labels = (x[:, :-1] for x in (batch.input_ids, batch.position_ids, batch.labels))
    documents = tuple((*lengths[:-1], lengths[-1] - 1) for lengths in batch.documents)
    shorter = blocks.prologue(Batch(ids, positions, labels, documents=documents))
    try:
        pairs = zip(entry.arguments, shorter.arguments, strict=True)
        blocks._axes = [token_axes(arguments, others) for arguments, others in pairs]
    except CannotTile as reason:
        return str(reason)
    return ""


def _tensors_of(entry: Entry) -> list[tuple[int, int]]:
    leaves = tree_leaves([[args, kwargs] for args, kwargs in entry.arguments])
    return [(id(leaf), leaf._version) for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    if isinstance(a, FakeTensor):
        return True  # the planner's: it has shapes to run on and no numbers to compare
    a, b, exact = a.float(), b.float(), b.dtype == torch.float32
    known = b.abs() < 1e30  # a logit that a model forbids is infinite, or nearly
    if not torch.equal(known, a.abs() < 1e30):
        return False
    a, b = (torch.where(known, x - x[known].mean(), 0.0) for x in (a, b))
    # Root mean squares, against the spread. In bf16, transformers' own eager and sdpa logits of SmolLM2-135M are 0.034
    # apart, after 30 layers; where documents see each other 0.42, where positions are wrong 0.43.
    return bool((a - b).norm() <= (1e-3 if exact else 0.15) * b.norm())
