"""The ends of a model on the host: the same loss and gradient, and no more than a chunk of the head on the device."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora.model import attention, ends
from qlora.model.adapters import attach
from qlora.model.blocks import cut
from qlora.model.ends import HOST, CannotStayOnHost, HeadOnHost, embedding_to_host, ends_to_host
from qlora.model.loss import head_loss, streamed_head_loss
from qlora.model.transfer import Lane
from tests.conftest import ARCHITECTURES, random_batch, tiny_config


def loaded(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).requires_grad_(False)


def of_config(architecture="llama", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=dtype)
    return model.requires_grad_(False)


def hidden_of(model, batch, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (*batch.input_ids.shape, model.config.hidden_size)
    return torch.randn(shape, generator=g).to(model.dtype)


def modules(model):
    return {name: id(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_streamed_head_gives_the_loss_and_gradient_of_the_whole_one(architecture, tied, checkpoint):
    model = loaded(checkpoint(architecture, tie_word_embeddings=tied))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    blocks, batch = cut(model), random_batch(3, 20)
    hidden, whole, state = (
        hidden_of(model, batch),
        modules(model),
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    expected_loss, expected = head_loss(blocks.epilogue, hidden, batch, 50, 1024, backward=True)
    for columns in (37, 128):
        head = ends_to_host(blocks, HOST, columns) if columns == 37 else HeadOnHost(blocks, HOST, columns)
        for chunk in (7, 1024):
            loss, found = streamed_head_loss(head.sweep, hidden, batch, 50, chunk, backward=True)
            # Other orders of summation, over at most 128 columns: a few fp32 roundings of the largest entry.
            assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
            assert torch.allclose(found, expected, atol=2e-6 * expected.abs().max(), rtol=0)
            loss, none = streamed_head_loss(head.sweep, hidden, batch, 50, chunk, backward=False)
            assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6) and none is None
    assert modules(model) == whole
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@contextmanager
def copies_counted(monkeypatch):
    """The first rows' addresses of all that goes through a lane, in order."""
    sources, copy = [], Lane.copy

    def counted(self, to, source, after=None):
        sources.append(source)
        return copy(self, to, source, after)

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "copy", counted)
        yield sources


@pytest.mark.parametrize("chunk", [3, 1024])
def test_each_chunk_of_the_head_comes_twice_a_micro_batch_however_many_tiles_of_tokens(chunk, monkeypatch):
    model = of_config(vocab_size=100)
    head, batch = HeadOnHost(cut(model), HOST, 16), random_batch(4, 20, vocab=100)
    rows = head.head.weight.shape[0]
    for backward, times in ((True, 2), (False, 1)):
        with copies_counted(monkeypatch) as sources:
            streamed_head_loss(head.sweep, hidden_of(model, batch), batch, 9, chunk, backward=backward)
        seen = torch.zeros(rows, dtype=torch.long)
        for source in sources:
            start = source.storage_offset() // source.shape[1]
            seen[start : start + len(source)] += 1
        assert torch.equal(seen, torch.full((rows,), times))


def test_the_next_chunk_is_asked_for_before_this_one_is_used_and_never_into_its_buffer(monkeypatch):
    model = of_config(vocab_size=100)
    head = HeadOnHost(cut(model), HOST, 16)
    with copies_counted(monkeypatch) as sources:
        for i, (columns, weight, _) in enumerate(head._passing()):
            assert len(sources) == min(i + 2, len(head.chunks))
            assert torch.equal(weight, head.head.weight[columns])


def test_a_buffer_is_written_only_behind_its_last_reader(monkeypatch):
    """With a lane whose events are the number of chunks that were read before them."""
    model = of_config(vocab_size=100)
    head, read, waits = HeadOnHost(cut(model), HOST, 16), 0, []
    monkeypatch.setattr(Lane, "now", lambda self: read)
    monkeypatch.setattr(Lane, "copy", lambda self, to, source, after: waits.append(after))
    for _ in head._passing():
        read += 1
    assert waits == [0, 0, *range(1, len(head.chunks) - 1)]


class Largest(TorchDispatchMode):
    """The largest storage that is made inside, in elements."""

    def __init__(self, known):
        super().__init__()
        self.known, self.numel = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_no_more_than_a_chunk_of_tokens_by_a_chunk_of_columns_ever_stands(architecture):
    model = of_config(architecture, vocab_size=4000, hidden_size=16, head_dim=4)
    head, batch = HeadOnHost(cut(model), HOST, 400), random_batch(2, 60, vocab=4000)
    hidden, chunk = hidden_of(model, batch), 32
    assert len(batch.targets()[0]) > 2 * chunk
    with Largest([*model.parameters(), *head._buffers]) as largest:
        streamed_head_loss(head.sweep, hidden, batch, 9, chunk, backward=True)
    assert largest.numel == chunk * 400
    with Largest(model.parameters()) as largest:  # the measure sees what it should
        head_loss(head._blocks.epilogue, hidden, batch, 9, chunk, backward=True)
    assert largest.numel == chunk * 4000


@pytest.mark.parametrize(
    "vocab, columns, expected", [(1000, 250, 32), (1000, 300, 26), (1000, 1000, 8), (1000, 9999, 8)]
)
def test_a_chunk_of_columns_has_room_for_more_tokens_the_narrower_it_is(vocab, columns, expected):
    head = HeadOnHost(cut(of_config(vocab_size=vocab)), HOST, columns)
    assert head.tokens_at_once(8) == expected


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text", "mixtral", "gpt2"])
def test_the_epilogue_makes_no_mask_and_waits_for_no_answer_of_the_device(architecture, checkpoint, monkeypatch):
    blocks = cut(loaded(checkpoint(architecture)))
    if blocks.model.config._attn_implementation == attention.NAME:
        monkeypatch.setattr(attention, "sdpa_mask", lambda *_, **__: pytest.fail("a mask was made"))

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number off the device"
            return func(*args, **(kwargs or {}))

    with Waits() if blocks.model.config._attn_implementation == attention.NAME else nullcontext():
        logits = blocks.epilogue(torch.zeros(5, 64))
    assert logits.shape == (5, 128)


@pytest.mark.parametrize("where", ["columns", "epilogue"])
def test_the_model_is_whole_again_after_an_error_inside(where, checkpoint, monkeypatch):
    model = loaded(checkpoint("llama"))
    blocks, batch = cut(model), random_batch()
    head, whole, hidden = HeadOnHost(blocks, HOST, 50), modules(model), hidden_of(model, batch)
    expected = head_loss(blocks.epilogue, hidden, batch, 9, 8, backward=True)
    entry = blocks.prologue(batch).hidden

    def fail(*args, **kwargs):
        raise RuntimeError("inside")

    with monkeypatch.context() as patch:
        if where == "columns":
            patch.setattr(ends.F, "linear", fail)
        else:
            patch.setattr(model.model.norm, "forward", fail)
        with pytest.raises(RuntimeError, match="inside"):
            streamed_head_loss(head.sweep, hidden, batch, 9, 8, backward=True)
    assert modules(model) == whole
    assert torch.equal(blocks.prologue(batch).hidden, entry)
    loss, gradient = streamed_head_loss(head.sweep, hidden, batch, 9, 8, backward=True)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert torch.allclose(gradient, expected[1], atol=2e-6 * gradient.abs().max(), rtol=0)


def test_a_trained_norm_behind_the_layers_gets_its_gradient(checkpoint):
    model = loaded(checkpoint("gemma2"))
    norm, blocks, batch = model.model.norm.requires_grad_(True), cut(model), random_batch(2, 20)
    hidden = hidden_of(model, batch)
    head_loss(blocks.epilogue, hidden, batch, 9, 8, backward=True)
    expected, norm.weight.grad = norm.weight.grad, None
    streamed_head_loss(HeadOnHost(blocks, HOST, 37).sweep, hidden, batch, 9, 8, backward=True)
    assert torch.allclose(norm.weight.grad, expected, atol=2e-6 * expected.abs().max(), rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_generation_with_the_ends_on_the_host_says_the_same(architecture, checkpoint):
    model = loaded(checkpoint(architecture)).eval()
    ids = torch.tensor([[5, 9, 40]])
    how = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **how)
    head = ends_to_host(cut(model), HOST, 37)
    whole = modules(model)
    with head.whole():
        found = model.generate(ids, **how)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * b.abs().max())
    assert modules(model) == whole


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_ids_come_to_the_embedding_and_rows_go_to_the_device(architecture):
    """On fake tensors, which can be on a GPU and do not let two devices mix."""
    gpu = torch.device("cuda:0")
    with FakeTensorMode():
        model = of_config(architecture, tie_word_embeddings=False, pad_token_id=None)
        embedding, ids = model.get_input_embeddings(), torch.zeros(2, 5, dtype=torch.long).to(gpu)
        with pytest.raises(RuntimeError, match="same device"):  # what would be without
            torch.nn.functional.embedding(ids, torch.zeros(128, 64))
        for name, buffer in embedding.named_buffers():
            setattr(embedding, name, buffer.to(gpu))
        embedding_to_host(model, gpu)
        assert {tensor.device for tensor in embedding.state_dict(keep_vars=True).values()} == {HOST}
        rows = embedding(ids)
        assert rows.device == gpu and rows.shape == (2, 5, 64)


def test_the_epilogue_looks_nothing_up(checkpoint):
    model = loaded(checkpoint("gpt2"))
    blocks, calls = cut(model), []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    blocks.epilogue(torch.zeros(5, 64))
    assert not calls


@pytest.mark.parametrize(
    "lora, reason",
    [
        ({"modules_to_save": ["lm_head"]}, "the head is trained"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the head is trained"),
        ({"modules_to_save": ["embed_tokens"]}, "the embedding is trained"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "the embedding is trained"),
    ],
)
def test_an_end_that_is_trained_stays_on_the_device_and_the_reason_is_said(lora, reason, checkpoint, recipe):
    path = checkpoint("llama")
    model = loaded(path)
    attach(model, recipe(path, lora=lora).lora, seed=0)
    with pytest.raises(CannotStayOnHost, match=reason):
        ends_to_host(cut(model), HOST, 50)


def test_an_end_that_method_full_trains_stays_on_the_device(checkpoint):
    model = loaded(checkpoint("llama")).requires_grad_(True)
    with pytest.raises(CannotStayOnHost, match="trained"):
        embedding_to_host(model, HOST)
    with pytest.raises(CannotStayOnHost, match="trained"):
        HeadOnHost(cut(model), HOST, 50)


def test_a_tied_embedding_does_not_go_alone():
    with pytest.raises(CannotStayOnHost, match="tied"):
        embedding_to_host(of_config(tie_word_embeddings=True), HOST)


def test_with_an_adapter_beside_them_both_ends_go(checkpoint, recipe):
    path = checkpoint("llama")
    model = loaded(path)
    attach(model, recipe(path).lora, seed=0)
    ends_to_host(cut(model), HOST, 50)


class Normalized(LlamaForCausalLM):
    """Its logits are log-probabilities: each depends on all."""

    def forward(self, *args, **kwargs):
        return CausalLMOutputWithPast(logits=super().forward(*args, **kwargs).logits.log_softmax(-1))


class Masked(GPT2LMHeadModel):
    """Forbids a token by its place in the vocabulary."""

    def forward(self, *args, **kwargs):
        logits = super().forward(*args, **kwargs).logits
        return CausalLMOutputWithPast(logits=logits.index_fill(-1, torch.tensor([100]), torch.finfo(logits.dtype).min))


@pytest.mark.parametrize("kind, architecture", [(Normalized, "llama"), (Masked, "gpt2")])
def test_a_head_whose_logits_depend_on_each_other_is_not_chunked(kind, architecture):
    torch.manual_seed(0)
    model = kind(tiny_config(architecture)).requires_grad_(False)
    whole = modules(model)
    with pytest.raises(CannotStayOnHost, match="cannot be chunked"):
        ends_to_host(cut(model), HOST, 50)
    assert modules(model) == whole and not model.get_input_embeddings()._forward_hooks
    ends_to_host(cut(model), HOST, 128)  # one chunk is the whole
