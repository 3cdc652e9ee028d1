"""The step: the same gradients in both orders, whatever the model, the split, the chunk."""

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora.config import MemoryConfig
from qlora.errors import ModelError
from qlora.model.adapters import attach, trainable
from qlora.model.batch import Batch
from qlora.model.blocks import Blocks, CannotCut, cut
from qlora.model.load import load_base
from qlora.model.loss import head_loss
from qlora.model.residency import Residency
from qlora.model.source import open_source
from qlora.train.step import LayerMajor, MicroBatchMajor, choose
from tests.conftest import ARCHITECTURES, random_batch, tiny_config

CPU = torch.device("cpu")


def adapted(config):
    """A model with an adapter that already does something, ready to train."""
    model = load_base(config, open_source(config.model), CPU).model
    peft_model = attach(model, config.lora, seed=0) if config.method != "full" else model
    g = torch.Generator().manual_seed(1)
    for name, parameter in trainable(peft_model).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=g)
    return peft_model.train(), model


def layer_major(model, **memory):
    blocks = cut(model)
    return LayerMajor(blocks, Residency(blocks.layers, CPU), MemoryConfig(**({"micro_batch_tokens": 0} | memory)))


def gradients(model):
    grads = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
    model.zero_grad()
    return grads


def last_hidden(model, blocks, batch):
    """What the model's own forward, with its own layers in place, has after the last of them."""
    left = []
    hook = blocks.layers[-1].register_forward_hook(lambda module, args, out: left.append(out))
    model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    hook.remove()
    return left[0][0] if isinstance(left[0], tuple) else left[0]


def standard_order(model, blocks, batches):
    """Gradient accumulation as everyone does it: whole forward, whole backward, next micro-batch."""
    supervised = sum(batch.supervised for batch in batches)
    total = 0.0
    for batch in batches:
        hidden = last_hidden(model, blocks, batch)
        loss, grad = head_loss(blocks.epilogue, hidden, batch, supervised, 1024, backward=True)
        hidden.backward(grad)
        total += loss.item()
    return total


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_bit_equal_to_the_standard_order(architecture, method, checkpoint, recipe):
    config = recipe(checkpoint(architecture), method)
    peft_model, model = adapted(config)
    step = layer_major(model)
    batches = [random_batch(2, seed=j) for j in range(3)]
    standard = standard_order(model, step.blocks, batches)
    expected = gradients(peft_model)
    result = step(batches)
    found = gradients(peft_model)
    assert result.loss == pytest.approx(standard, rel=1e-6)
    assert found.keys() == expected.keys() and len(found) == len(trainable(peft_model)) > 0
    unequal = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not unequal
    assert any(grad.abs().max() > 0 for grad in found.values())


def test_the_step_visits_each_layer_twice_and_the_last_once_however_many_micro_batches(checkpoint, recipe):
    _, model = adapted(recipe(checkpoint("llama")))
    step = layer_major(model)
    for k in (1, 5):
        before = step.residency.visits
        step([random_batch(seed=j) for j in range(k)])
        assert step.residency.visits - before == 2 * len(step.blocks) - 1


@pytest.mark.parametrize("rows_and_k", [(4, 2), (2, 4), (1, 8)])
def test_loss_and_gradients_do_not_depend_on_how_rows_are_split(rows_and_k, checkpoint, recipe):
    peft_model, model = adapted(recipe(checkpoint("qwen3")))
    step = layer_major(model)
    whole = random_batch(8, 10)
    rows, k = rows_and_k
    parts = [
        Batch(whole.input_ids[i : i + rows], whole.position_ids[i : i + rows], whole.labels[i : i + rows])
        for i in range(0, rows * k, rows)
    ]
    together, expected = step([whole]), gradients(peft_model)
    apart, found = step(parts), gradients(peft_model)
    assert apart.loss == pytest.approx(together.loss, rel=1e-6)
    # Other shapes, so other orders of summation: a few fp32 roundings of the largest entry.
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=1e-5 * expected[name].abs().max(), rtol=1e-4), name


def test_the_loss_is_transformers_own(checkpoint, recipe):
    _, model = adapted(recipe(checkpoint("gemma2")))  # with a soft cap behind the head
    step, batch = layer_major(model), random_batch(3, 20, supervised=0.4)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    assert step([batch]).loss == pytest.approx(expected.item(), rel=1e-5)
    assert step.evaluate([batch]).loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 7])
def test_the_chunk_of_the_loss_changes_nothing_but_memory(chunk, checkpoint, recipe):
    peft_model, model = adapted(recipe(checkpoint("llama")))
    batch = random_batch(2, 20)
    expected_loss, expected = layer_major(model)([batch]).loss, gradients(peft_model)
    loss, found = layer_major(model, loss_chunk_tokens=chunk)([batch]).loss, gradients(peft_model)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=1e-5 * expected[name].abs().max(), rtol=1e-4), name


def test_as_many_logits_stand_with_the_head_on_the_host_as_on_the_device(checkpoint, recipe, monkeypatch):
    """Not fewer: each call of the epilogue costs, however few tokens it is for."""
    _, model = adapted(recipe(checkpoint("llama", vocab_size=1000)))
    batch, calls, epilogue = random_batch(2, 33, vocab=1000, supervised=1.0), [], Blocks.epilogue
    monkeypatch.setattr(Blocks, "epilogue", lambda *args: calls.append(epilogue(*args)) or calls[-1])
    for where, shapes in (("device", [(8, 1000)] * 8), ("host", [(32, 250)] * 8)):
        step = layer_major(model, loss_chunk_tokens=8, embeddings=where, vocabulary_chunk=250)
        calls.clear()
        step.evaluate([batch])
        assert [tuple(logits.shape) for logits in calls] == shapes


def test_recompute_draws_the_dropout_masks_of_the_first_pass(checkpoint, recipe):
    """The gradient is the derivative of the loss that was computed, which it is not where the masks differ."""
    peft_model, model = adapted(recipe(checkpoint("llama"), lora={"lora_dropout": 0.5}))
    step, batches = layer_major(model), [random_batch(2, seed=j) for j in range(2)]
    loss = step(batches, step=3).loss
    grads = gradients(peft_model)
    assert step(batches, step=3).loss == loss != step(batches, step=4).loss
    model.zero_grad()
    g = torch.Generator().manual_seed(5)
    direction = {name: torch.randn(grad.shape, generator=g) for name, grad in grads.items()}
    slope = sum((grads[name] * direction[name]).sum().item() for name in grads)

    def loss_at(distance):
        for name, p in trainable(peft_model).items():
            p.data += distance * direction[name]
        found = step(batches, step=3).loss
        for name, p in trainable(peft_model).items():
            p.data -= distance * direction[name]
        return found

    h = 1e-3
    assert (loss_at(h) - loss_at(-h)) / (2 * h) == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_documents_train_as_separate_ones_do(architecture, checkpoint, recipe):
    peft_model, model = adapted(recipe(checkpoint(architecture)))
    step = layer_major(model)
    assert step.isolates_documents
    documents = [random_batch(1, tokens, seed=tokens) for tokens in (5, 9, 12)]
    packed = Batch(
        torch.cat([d.input_ids for d in documents], 1),
        torch.cat([d.position_ids for d in documents], 1),
        torch.cat([d.labels for d in documents], 1),
    )
    expected_loss, expected = step(documents).loss, gradients(peft_model)
    loss, found = step([packed]).loss, gradients(peft_model)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=1e-4 * expected[name].abs().max(), rtol=1e-3), name


def test_micro_batches_of_one_shape_are_computed_together_and_give_the_same_gradients(checkpoint, recipe):
    peft_model, model = adapted(recipe(checkpoint("qwen3")))
    apart = layer_major(model)
    together = LayerMajor(apart.blocks, apart.residency, MemoryConfig(micro_batch_tokens=30))
    batches = [random_batch(1, tokens, seed=j) for j, tokens in enumerate((12, 12, 12, 9, 12))]
    expected_loss, expected = apart(batches).loss, gradients(peft_model)
    result, found = together(batches), gradients(peft_model)
    assert result.loss == pytest.approx(expected_loss, rel=1e-6)
    assert result.rows == (("row0.0", "row1.0"), ("row2.0",), ("row3.0",), ("row4.0",))
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=1e-5 * expected[name].abs().max(), rtol=1e-4), name


@pytest.mark.parametrize("padding", [0, 3])
def test_a_micro_batch_that_is_split_by_rows_gives_the_same_gradients(padding, checkpoint, recipe):
    peft_model, model = adapted(recipe(checkpoint("qwen3")))
    whole = layer_major(model)
    split = LayerMajor(whole.blocks, whole.residency, MemoryConfig(micro_batch_tokens=30))
    batch = random_batch(5, 12)
    if padding:
        batch.labels[1, -padding:] = -100
        mask = torch.ones_like(batch.input_ids)
        mask[1, -padding:] = 0
        batch = Batch(batch.input_ids, batch.position_ids, batch.labels, mask, batch.rows)
    expected_result, expected = whole([batch]), gradients(peft_model)
    result, found = split([batch]), gradients(peft_model)
    assert result.loss == pytest.approx(expected_result.loss, rel=1e-6)
    assert result.rows == (("row0.0", "row0.1"), ("row0.2", "row0.3"), ("row0.4",))
    assert (result.tokens, result.supervised) == (expected_result.tokens, expected_result.supervised)
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=1e-5 * expected[name].abs().max(), rtol=1e-4), name


def test_padding_changes_nothing(checkpoint, recipe):
    peft_model, model = adapted(recipe(checkpoint("llama")))
    step, short, long = layer_major(model), random_batch(1, 7, seed=1), random_batch(1, 11, seed=2)
    pad = torch.nn.functional.pad
    padded = Batch(
        torch.cat([pad(short.input_ids, (0, 4)), long.input_ids]),
        torch.arange(11).repeat(2, 1),
        torch.cat([pad(short.labels, (0, 4), value=-100), long.labels]),
        torch.cat([pad(torch.ones(1, 7, dtype=torch.long), (0, 4)), torch.ones(1, 11, dtype=torch.long)]),
    )
    expected_loss, expected = step([short, long]).loss, gradients(peft_model)
    loss, found = step([padded]).loss, gradients(peft_model)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=1e-5 * expected[name].abs().max(), rtol=1e-4), name


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_both_orders_agree(method, checkpoint, recipe):
    peft_model, model = adapted(recipe(checkpoint("llama"), method))
    batches = [random_batch(2, seed=j) for j in range(3)]
    fast = layer_major(model)(batches)
    expected = gradients(peft_model)
    slow = MicroBatchMajor(model, Residency([model], CPU), loss_chunk=1024)(batches)
    found = gradients(peft_model)
    assert slow.loss == pytest.approx(fast.loss, rel=1e-6)
    assert found.keys() == expected.keys() == trainable(peft_model).keys()
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=1e-5 * expected[name].abs().max(), rtol=1e-3), name


@pytest.mark.parametrize("trained", [["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"]], ids=" and ".join)
def test_a_trained_head_or_embedding_gets_its_gradient(trained, checkpoint, recipe):
    peft_model, model = adapted(recipe(checkpoint("llama"), lora={"modules_to_save": trained}))
    batches = [random_batch(2, seed=j) for j in range(2)]
    layer_major(model)(batches)
    expected = gradients(peft_model)
    MicroBatchMajor(model, Residency([model], CPU), loss_chunk=1024)(batches)
    found = gradients(peft_model)
    saved = [name for name in expected if "embed_tokens" in name or "lm_head" in name]
    assert len(saved) == len(trained)
    for name in saved:
        assert torch.allclose(expected[name], found[name], atol=1e-5 * expected[name].abs().max(), rtol=1e-3), name


class TwiceThrough(LlamaForCausalLM):
    """Runs its layers two times over, so that no single pass through them is the model."""

    def forward(self, input_ids, position_ids=None, attention_mask=None, use_cache=None, **kwargs):
        hidden = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        hidden = self.model(inputs_embeds=hidden, position_ids=position_ids, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))


def test_a_model_that_cannot_be_cut_trains_in_the_standard_order_and_says_so(tmp_path):
    model = TwiceThrough(tiny_config("llama"))
    with pytest.raises(CannotCut):
        cut(model)
    said = []
    step = choose(model, CPU, MemoryConfig(), 0, tmp_path, said.append)
    assert step.order == "standard"
    assert "TwiceThrough trains in the standard order" in said[0]
    assert step([random_batch()]).loss > 0
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    with pytest.raises(ModelError, match="cannot be cut"):
        choose(model, CPU, MemoryConfig(order="layer-major"), 0, tmp_path, said.append)
    with pytest.raises(ModelError, match=r"memory\.layers_on_device: 1, memory\.activations: host: .*cannot be cut"):
        choose(model, CPU, MemoryConfig(layers_on_device=1, activations="host"), 0, tmp_path, said.append)


class SideChannel(LlamaForCausalLM):
    """Its layers write into a tensor that they were all handed, as models with shared keys and values do."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.register_forward_hook(self.write, with_kwargs=True)

    @staticmethod
    def write(layer, args, kwargs, out):
        kwargs["shared"].add_(1)

    def forward(self, input_ids, position_ids=None, **kwargs):
        kwargs.pop("use_cache", None)
        shared = torch.zeros(1)
        hidden = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, shared=shared)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden.last_hidden_state))


def test_a_model_whose_layers_talk_on_the_side_is_not_cut():
    with pytest.raises(CannotCut, match="beside the hidden state"):
        cut(SideChannel(tiny_config("llama")))


def test_the_model_is_whole_again_after_it_was_cut(checkpoint, recipe):
    _, model = adapted(recipe(checkpoint("llama")))
    layers, batch = model.model.layers, random_batch()
    with torch.no_grad():
        before = model(input_ids=batch.input_ids).logits
        layer_major(model)([batch])
        assert torch.equal(before, model(input_ids=batch.input_ids).logits)
    assert model.model.layers is layers
