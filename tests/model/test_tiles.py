"""Layers in tiles of tokens: the same results and gradients, with a few tensors of all tokens and no more."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qlora.config import LoraSection
from qlora.model import attention
from qlora.model.adapters import attach
from qlora.model.batch import Batch, regroup
from qlora.model.blocks import CannotCut, cut
from qlora.model.tiles import WHOLE, CannotTile, token_axes
from tests.conftest import random_batch, tiny_config
from tests.model.test_attention import SWITCHED, packed, padded

BATCHES = {
    "single": packed(30),
    "packed": packed(5, 9, 9, 12),
    "joined rows": regroup([packed(12, 20), packed(32, seed=1), packed(4, 4, 24, seed=2)], 1000)[0],
    "padded": padded(9, 30, 17),
}


def adapted(path, dropout=0.0):
    """A model whose adapters already do something, and its blocks."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    section = LoraSection(r=4, lora_alpha=8, lora_dropout=dropout)
    attach(model, section, seed=0)
    g = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=g)
    return model.train(), cut(model)


def through_layer(blocks, entry, tile, i=1, needs_x=True, seed=0, wanted=True):
    """A layer's answer, and the gradients of its input and of its adapters."""
    torch.manual_seed(seed)
    blocks.tile_tokens = tile
    x = entry.hidden.detach().clone().requires_grad_(needs_x)
    y = blocks.layer(i, x, entry, wanted)
    answer = y.detach().clone()
    slopes = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(slopes)
    gradients = {name: p.grad for name, p in blocks.model.named_parameters() if p.grad is not None}
    blocks.model.zero_grad()
    return answer, x.grad, gradients


def close(found, expected):
    # Matrix products over fewer rows, and their sums in other orders: some fp32 roundings of the largest entry.
    return (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("tile", [1, 7, 16])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("architecture", SWITCHED)
def test_tiles_give_the_answer_and_gradients_of_one_piece(architecture, batch, tile, checkpoint):
    _, blocks = adapted(checkpoint(architecture))
    assert blocks.can_tile
    entry = blocks.prologue(batch)
    y, dx, gradients = through_layer(blocks, entry, None)
    tiled_y, tiled_dx, tiled_gradients = through_layer(blocks, entry, tile)
    assert close(tiled_y, y) and close(tiled_dx, dx)
    assert tiled_gradients.keys() == gradients.keys() and len(gradients) >= 4
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0 and close(tiled_gradients[name], gradient), name
    with torch.no_grad():
        assert torch.equal(blocks.layer(1, entry.hidden, entry), tiled_y)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_have_gradients_where_the_input_needs_none(architecture, checkpoint):
    _, blocks = adapted(checkpoint(architecture))
    entry = blocks.prologue(packed(9, 21))
    _, dx, gradients = through_layer(blocks, entry, None, i=0, needs_x=False)
    _, tiled_dx, tiled_gradients = through_layer(blocks, entry, 8, i=0, needs_x=False)
    assert dx is None and tiled_dx is None
    assert tiled_gradients.keys() == gradients.keys()
    assert all(close(tiled_gradients[name], gradient) for name, gradient in gradients.items())


def test_gradients_are_the_same_where_the_answer_is_not_wanted(checkpoint):
    _, blocks = adapted(checkpoint("qwen3"))
    entry = blocks.prologue(packed(9, 21))
    _, dx, gradients = through_layer(blocks, entry, 8)
    _, other_dx, others = through_layer(blocks, entry, 8, wanted=False)
    assert torch.equal(dx, other_dx)
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_the_gradient_of_the_input_takes_the_place_of_the_one_that_came_in(checkpoint):
    _, blocks = adapted(checkpoint("llama"))
    entry = blocks.prologue(packed(30))
    blocks.tile_tokens = 8
    x = entry.hidden.detach().requires_grad_()
    y = blocks.layer(0, x, entry)
    g = torch.ones_like(y)
    y.backward(g)
    assert x.grad.data_ptr() == g.data_ptr()


@pytest.mark.parametrize("attention_dropout", [0.0, 0.3])
def test_every_phase_draws_the_same_dropout(attention_dropout, checkpoint):
    """The gradient is the slope of the answer that was given, which it is not where the masks differ."""
    path = checkpoint("llama", attention_dropout=attention_dropout)
    model, blocks = adapted(path, dropout=0.5)
    entry = blocks.prologue(packed(9, 21))
    y, dx, gradients = through_layer(blocks, entry, 8, seed=3)
    left = torch.rand(1)
    again, dx_again, _ = through_layer(blocks, entry, 8, seed=3)
    assert torch.equal(y, again) and torch.equal(dx, dx_again) and torch.equal(left, torch.rand(1))
    assert not torch.equal(y, through_layer(blocks, entry, 8, seed=4)[0])
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(blocks.layer(1, entry.hidden, entry), y)
        assert not torch.equal(blocks.layer(1, entry.hidden, entry), y)  # another seed follows

    g = torch.Generator().manual_seed(5)
    parameters = dict(model.named_parameters())
    directions = {name: torch.randn(p.shape, generator=g) for name, p in gradients.items()}
    slope = sum((gradients[name] * direction).sum().item() for name, direction in directions.items())
    slopes = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).double()

    def at(distance):
        for name, direction in directions.items():
            parameters[name].data += distance * direction
        moved = through_layer(blocks, entry, 8, seed=3)[0]
        for name, direction in directions.items():
            parameters[name].data -= distance * direction
        return (moved.double() * slopes).sum().item()

    h = 1e-3  # second differences of the order of h squared, and fp32 roundings of the answer over h
    assert (at(h) - at(-h)) / (2 * h) == pytest.approx(slope, rel=0.01)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made since, and the most that there were at a time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.sizes:
                storage = leaf.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._died, storage._cdata)
                self.peak = max(self.peak, self.live)
        return out

    def _died(self, key):
        self.live -= self.sizes.pop(key)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_what_grows_with_the_tokens_is_a_few_tensors(architecture, checkpoint, monkeypatch):
    """Under a sliding window too: mistral's here is of 8 tokens."""
    monkeypatch.setattr(attention, "QUERY_TILE", 64)
    _, blocks = adapted(checkpoint(architecture, max_position_embeddings=4096, intermediate_size=512))

    def peak(tokens, tile):
        blocks.tile_tokens = tile
        entry = blocks.prologue(packed(tokens))
        x = entry.hidden.detach().clone().requires_grad_()
        gc.collect()
        gc.disable()  # what lives in a circle would live on in training too
        try:
            with LiveBytes() as memory:
                gradient = torch.ones_like(x)
                blocks.layer(1, x, entry).backward(gradient)
        finally:
            gc.enable()
        blocks.model.zero_grad(set_to_none=False)
        return memory.peak

    peak(64, None)  # the adapters' gradients are made
    boundary = 64 * 4  # bytes of a token's hidden state
    untiled, tiled = peak(4096, None), peak(4096, 128)
    assert tiled < untiled / 3
    per_token = (tiled - peak(2048, 128)) / 2048
    # x, its gradient, the answer, queries, attention's answer and its gradient: 6. Keys and values, of half the heads:
    # 1. Of one key head out of two, the gradients of queries, keys and values: 1. The rotary tables, of a quarter: 0.5.
    assert per_token <= 8.6 * boundary


class Twice(LlamaForCausalLM):
    """Its layers call attention two times."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.register_forward_hook(self.again, with_kwargs=True)

    @staticmethod
    def again(module, args, kwargs, out):
        return (out[0] + module.forward(*args, **kwargs)[0], *out[1:])


class Mixed(LlamaForCausalLM):
    """Its layers mix tokens outside of attention."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.register_forward_hook(lambda module, args, out: out + out.cumsum(1))


@pytest.mark.parametrize(
    "kind, reason", [(Twice, "more than once"), (Mixed, "does not give what it gives in one piece")]
)
def test_a_layer_that_cannot_be_tiled_says_why(kind, reason):
    torch.manual_seed(0)
    blocks = cut(kind(tiny_config("llama")))
    assert not blocks.can_tile
    with pytest.raises(CannotCut, match=reason):
        blocks.tile_tokens = 8
    blocks.tile_tokens = None
    entry = blocks.prologue(packed(30))
    assert blocks.layer(0, entry.hidden, entry).shape == entry.hidden.shape


def test_the_axis_of_the_tokens_is_the_one_that_differs():
    def arguments(tokens):
        return (torch.ones(1, tokens), 3), {
            "rotary": (torch.ones(1, tokens, 8), torch.ones(3, 1, tokens, 8)),
            "no": None,
            "table": torch.ones(4),
        }

    assert token_axes(arguments(8), arguments(7)) == [1, None, 1, 2, None, WHOLE]
    with pytest.raises(CannotTile, match="depends on the number of tokens"):
        token_axes(arguments(8), ((), {}))
    with pytest.raises(CannotTile, match="tokens x tokens"):
        token_axes(((torch.ones(8, 8),), {}), ((torch.ones(7, 7),), {}))


def test_batches_shorter_than_a_tile_are_run_in_one_piece(checkpoint):
    _, blocks = adapted(checkpoint("llama"))
    entry = blocks.prologue(
        Batch(*(getattr(random_batch(2, 8), name) for name in ("input_ids", "position_ids", "labels")))
    )
    calls = []
    blocks.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for tile, expected in ((None, 1), (16, 1), (15, 4), (8, 4)):
        blocks.tile_tokens = tile
        calls.clear()
        with torch.no_grad():
            blocks.layer(0, entry.hidden, entry)
        assert len(calls) == expected, tile
