"""Attention without masks: what stock attention computes, and nothing of tokens x tokens on the way."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qlora.model import attention
from qlora.model.attention import Call, Unsupported, attend
from qlora.model.batch import Batch, regroup
from qlora.model.blocks import CannotCut, cut, inputs_of
from tests.conftest import ARCHITECTURES, random_batch, tiny_config

# transformers 5.23 gives gemma2 no sdpa, for the soft cap inside its attention.
SWITCHED = [architecture for architecture in ARCHITECTURES if architecture != "gemma2"]


def loaded(path, **changes):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **changes).eval()


def packed(*lengths, seed=0):
    batch = random_batch(1, sum(lengths), seed=seed)
    return Batch(batch.input_ids, torch.cat([torch.arange(n) for n in lengths])[None], batch.labels)


def padded(*lengths):
    whole = random_batch(len(lengths), max(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return Batch(whole.input_ids * mask, whole.position_ids, whole.labels.masked_fill(mask == 0, -100), mask)


def joined(*batches):
    return regroup(batches, 1000)[0]


BATCHES = {
    "one document": packed(30),
    "packed": packed(5, 9, 9, 1, 1, 12),
    "rows with borders in the same places": joined(packed(10, 10, 13), packed(10, 10, 13, seed=1)),
    "rows with borders of their own": joined(packed(12, 20), packed(32, seed=1), packed(4, 4, 24, seed=2)),
    "padded": padded(9, 30, 17),
}


def through_blocks(blocks, batch):
    entry = blocks.prologue(batch)
    hidden = entry.hidden
    for i in range(len(blocks)):
        hidden = blocks.layer(i, hidden, entry)
    return blocks.epilogue(hidden.flatten(0, 1)).unflatten(0, batch.input_ids.shape)


def whole(model, batch):
    return model(**inputs_of(model, batch)).logits


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("architecture", SWITCHED)
def test_logits_and_gradients_are_those_of_stock_attention(architecture, kind, checkpoint, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_TILE", 7)  # or no document here is longer than one
    model, batch = loaded(checkpoint(architecture)), BATCHES[kind]
    assert model.config._attn_implementation == "sdpa"
    real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    found = []
    for logits_of in (lambda: whole(model, batch), lambda: through_blocks(cut(model), batch)):
        logits = logits_of()[real.bool()]
        slopes = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        (logits * slopes).sum().backward()
        found.append((logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
        model.zero_grad()
    assert model.config._attn_implementation == attention.NAME
    (expected, expected_gradients), (logits, gradients) = found
    # Softmax sums in another order: some fp32 roundings through three layers.
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        shapes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.entries = max([self.entries, *(min(pair) for pair in zip(sizes, shapes, strict=True))])
        return out


@pytest.mark.parametrize("lengths", [(1024,), (400, 424, 200)], ids=["one document", "packed"])
@pytest.mark.parametrize("architecture", SWITCHED)
def test_nothing_of_tokens_x_tokens_is_made(architecture, lengths, checkpoint, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_TILE", 64)
    positions = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    model, batch, tokens = loaded(checkpoint(architecture, **{positions: 1024})), packed(*lengths), sum(lengths)
    with Largest() as stock:
        whole(model, batch).sum().backward()
    blocks = cut(model)
    with Largest() as ours:
        through_blocks(blocks, batch).sum().backward()
    # The largest that has to be: mixtral's two experts a token, 2 x 128 wide each.
    assert ours.entries <= tokens * 512
    if len(lengths) > 1:
        assert stock.entries >= tokens * tokens


@pytest.mark.parametrize("tile", [5, 1024])
@pytest.mark.parametrize("window", [1, 3, 8, 12, 40, None])
def test_a_window_is_what_its_mask_says(window, tile, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_TILE", tile)
    module = nn.Module()
    module.num_key_value_groups = 2
    lengths, g = (7, 12, 12, 1, 23), torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    states = [torch.randn(2, heads, tokens, 8, generator=g, requires_grad=True) for heads in (4, 2, 2)]
    found = attend(Call(module, *states, window, 0.3, 0.0), (lengths, lengths), {window})
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(tokens)
    mask = (document[:, None] == document) & (at[:, None] >= at)
    if window is not None:
        mask &= at[:, None] - at < window
    query, key, value = states[0], *(x.repeat_interleave(2, 1) for x in states[1:])
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-5)
    slopes = torch.randn(expected.shape, generator=g)
    wanted = torch.autograd.grad(expected, states, slopes)
    for gradient, truth in zip(torch.autograd.grad(found, states, slopes), wanted, strict=True):
        assert torch.allclose(gradient, truth, atol=1e-5)


def test_a_window_that_the_masks_do_not_have_is_refused():
    """A probe shorter than a window could not tell, so the mask and the attention must name the same one."""
    states = [torch.randn(1, 2, 5, 4) for _ in range(3)]
    with pytest.raises(Unsupported, match="window 4096"):
        attend(Call(nn.Module(), *states, 4096, None, 0.0), ((5,),), {None})


@pytest.mark.parametrize("architecture", SWITCHED)
def test_other_tokens_in_one_document_leave_the_others_alone(architecture, checkpoint):
    blocks, batch = cut(loaded(checkpoint(architecture))), packed(11, 14, 9)
    assert blocks.isolates_documents
    ids = batch.input_ids.clone()
    ids[:, 11:25] = ids[:, 11:25].flip(1)
    with torch.no_grad():
        before, after = through_blocks(blocks, batch), through_blocks(blocks, Batch(ids, batch.position_ids, ids))
    same = torch.tensor([*range(11), *range(25, 34)])
    # Not bit-equal: mixtral sorts tokens by expert, so that a token's product is taken among other rows.
    assert torch.allclose(before[:, same], after[:, same], atol=1e-5 * before.abs().max().item())
    assert not torch.allclose(before[:, 20], after[:, 20], atol=1e-2)


@pytest.mark.parametrize("architecture", SWITCHED)
def test_a_switched_model_generates_as_before(architecture, checkpoint):
    model, prompts = loaded(checkpoint(architecture)), random_batch(2, 12).input_ids
    mask = torch.ones_like(prompts)
    mask[0, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "output_logits": True}
    expected = model.generate(prompts, return_dict_in_generate=True, **settings)
    cut(model)
    assert model.config._attn_implementation == attention.NAME
    found = model.generate(prompts, return_dict_in_generate=True, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_attention_that_the_user_chose_stays(checkpoint):
    for architecture in ("llama", "gemma2"):
        model = loaded(checkpoint(architecture), attn_implementation="eager")
        blocks = cut(model)
        assert model.config._attn_implementation == "eager" and not blocks.can_tile
        assert blocks.isolates_documents
        with pytest.raises(CannotCut, match="its attention is eager"):
            blocks.tile_tokens = 16


def test_a_model_with_more_to_its_attention_keeps_its_own(checkpoint):
    model = loaded(checkpoint("llama"))
    for layer in model.model.layers:
        layer.self_attn.is_causal = False  # its masks make it causal, not its attention
    with torch.no_grad():
        expected = whole(model, BATCHES["packed"])
        blocks = cut(model)
        assert model.config._attn_implementation == "sdpa" and not blocks.can_tile
        assert torch.allclose(
            through_blocks(blocks, BATCHES["packed"]), expected, atol=1e-5 * expected.abs().max().item()
        )


class Louder(LlamaForCausalLM):
    """Scales its attention by what only stock attention is told."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.register_forward_hook(self.scale)

    @staticmethod
    def scale(module, args, out):
        return (out[0] * (1.0 if module.config._attn_implementation == attention.NAME else 2.0), *out[1:])


def test_a_model_that_is_not_itself_under_our_attention_keeps_its_own():
    model = Louder(tiny_config("llama"))
    nn.init.normal_(model.model.layers[0].self_attn.o_proj.weight)
    blocks = cut(model)
    assert model.config._attn_implementation == "sdpa" and not blocks.can_tile


def test_the_proof_passes_the_layers_twice(checkpoint):
    """A 70B model on an SSD takes 12 s a pass, so each layer is done with before the next one begins."""
    model = loaded(checkpoint("llama"))
    order = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: order.append(i))
    cut(model)
    assert order[:3] == [0, 1, 2]
    assert order[3:] == sorted(order[3:])


def test_a_batch_knows_its_documents():
    batch = packed(5, 9, 1)
    assert batch.documents == ((5, 9, 1),)
    assert batch.to("cpu").documents is batch.documents
    assert joined(batch, packed(15)).documents == ((5, 9, 1), (15,))
    assert padded(3, 8).documents == ((8,), (8,))
