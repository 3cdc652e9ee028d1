"""The methods that are compared do the same work: same weights, same micro-batches, same losses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.bench.methods import Stock, as_directory, batches_of, config_of, prepare
from qlora.bench.work import Setup, Work
from qlora.errors import ModelError, RecipeError
from qlora.plan.ledger import Ledger
from qlora.train.checkpoint import Run
from qlora.train.loop import Loop
from tests.conftest import SMALL
from tests.tiny import chat_model, recipe_text

CPU = torch.device("cpu")
SHAPE = SMALL | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
# Before the first update B is zero, so both sides round the same products; a kernel that rounds elsewhere moves a
# token's logit by up to 2^-9, and they average out. One token more or less in the denominator is caught.
FIRST = 2**-10
# Behind it, Adam's first steps are of full length however small a gradient is, and bf16 rounds in other places.
LATER = 1e-2


NO_SOURCE: Any = None  # random tokens need no tokenizer


def setup(method, model, **changes):
    usual = {"name": method, "is_shape": False, "r": 4, "optim": "adamw_torch", "device": "cpu"}
    return Setup(**usual | {"method": method, "model": str(model)} | changes)


def losses(one: Setup, work: Work, directory: Path, steps: int = 3, learning_rate: float = 2e-2):
    """What a setup made ready is, and its losses step by step under the Loop."""
    ready = prepare(one, directory, CPU, print)
    batches = batches_of(one, work, ready.vocab, ready.source, steps)
    training = ready.config.training.model_copy(update={"learning_rate": learning_rate})
    loop = Loop(ready.step, ready.parameters, lambda _: batches[0], training, Run(), lambda *_, **__: None)
    found = []
    for number, micro_batches in enumerate(batches, 1):
        result = ready.step(micro_batches, number)
        loop.update(result, micro_batches, number)
        found.append(result.loss)
    return ready, found


def agree(ours, stock):
    assert ours[0] == pytest.approx(stock[0], rel=FIRST)
    assert ours == pytest.approx(stock, rel=LATER)
    assert ours[-1] < (1 - 3 * LATER) * ours[0]  # or this would say nothing of the updates


@pytest.fixture
def shape(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(SHAPE))
    return path


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_ours_and_the_stock_stack_learn_the_same(method, checkpoint, tmp_path):
    model, work = checkpoint("llama"), Work(2, 2, 16)
    ours, our_losses = losses(setup(method, model), work, tmp_path)
    stock, stock_losses = losses(setup(f"hf-{method}", model), work, tmp_path)
    agree(our_losses, stock_losses)
    assert {name: p.shape for name, p in ours.parameters.items()} == {n: p.shape for n, p in stock.parameters.items()}
    assert list(ours.parameters) == list(stock.parameters)
    assert all(p.dtype == torch.float32 for p in (*ours.parameters.values(), *stock.parameters.values()))
    assert ours.base_parameters == stock.base_parameters and ours.vocab == stock.vocab == 128
    assert ours.residency is not None and stock.residency is None
    assert (ours.facts["order"], stock.facts["order"]) == ("layer-major", "standard")
    assert stock.facts["attention"] == "sdpa"
    assert (
        ("bitsandbytes" in stock.facts["versions"]) == ("bitsandbytes" in ours.facts["versions"]) == (method == "qlora")
    )


def test_full_fine_tuning_trains_every_weight(checkpoint, tmp_path):
    ready, found = losses(setup("full", checkpoint("llama")), Work(2, 1, 16), tmp_path)
    assert sum(p.numel() for p in ready.parameters.values()) == ready.base_parameters
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_the_stock_stack_draws_the_weights_of_a_shape_as_ours_does(method, shape, tmp_path):
    work = Work(2, 1, 16)
    ours, our_losses = losses(setup(method, shape, is_shape=True), work, tmp_path)
    stock, stock_losses = losses(setup(f"hf-{method}", shape, is_shape=True), work, tmp_path)
    agree(our_losses, stock_losses)
    models: list[Any] = [ours.model, stock.model]
    embeddings = [model.get_base_model().get_input_embeddings().weight for model in models]
    assert embeddings[0].equal(embeddings[1]) and embeddings[0].dtype == torch.bfloat16
    assert embeddings[0].std() > 0.01  # drawn
    assert ours.base_parameters == stock.base_parameters


def test_a_shape_is_quantized_one_tensor_at_a_time(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text(json.dumps(SHAPE | {"num_hidden_layers": 24}))
    with Ledger() as ledger:
        ledger.start()
        ready = prepare(setup("hf-qlora", path, is_shape=True), tmp_path, CPU, print)
        loading = ledger.peak(CPU)[1].nbytes
    adapter = sum(p.numel() * 4 for p in ready.parameters.values())
    assert loading - adapter < 0.6 * 2 * ready.base_parameters  # of the bytes that 16 bits each would be


def test_a_recipes_rows_are_the_same_for_every_method_packed_or_not(checkpoint, tmp_path):
    model, work = chat_model(checkpoint), Work(2, 2, 64)
    for packing in (True, False):
        path = tmp_path / "recipe.json"
        path.write_text(recipe_text(Path("elsewhere"), tmp_path, data={"packing": packing}))
        ours, our_losses = losses(setup("qlora", model, recipe=str(path)), work, tmp_path)
        stock, stock_losses = losses(setup("hf-qlora", model, recipe=str(path)), work, tmp_path)
        agree(our_losses, stock_losses)
        taken = [batches_of(setup("lora", model, recipe=str(path)), work, 0, s.source, 6) for s in (ours, stock)]
        flat = [[batch for step in each for batch in step] for each in taken]
        assert all(len(step) == 2 for step in taken[0])  # going round: there are fewer micro-batches than that
        assert [batch.rows for batch in flat[0]] == [batch.rows for batch in flat[1]]
        assert all(a.input_ids.equal(b.input_ids) for a, b in zip(*flat, strict=True))
        assert all((batch.attention_mask is None) is packing for batch in flat[0])
        assert any(len(batch.documents[0]) > 1 for batch in flat[0]) is packing


def test_random_tokens_are_the_same_in_every_step_and_all_carry_loss():
    first, second = batches_of(setup("lora", "any"), Work(3, 2, 8), 100, NO_SOURCE, 2)
    assert len(first) == 3 and all(a is b for a, b in zip(first, second, strict=True))
    assert all(batch.supervised == 2 * 7 and batch.input_ids.shape == (2, 8) for batch in first)
    assert not first[0].input_ids.equal(first[1].input_ids)


def test_the_stock_step_counts_supervised_tokens_over_all_micro_batches(checkpoint, tmp_path):
    """A micro-batch with few tokens to learn weighs as little in it as in ours."""
    model = checkpoint("llama")
    few, many = batches_of(setup("lora", model), Work(2, 1, 16), 128, NO_SOURCE, 1)[0]
    few = replace(few, labels=few.labels.index_fill(1, torch.arange(14), -100))
    results = []
    for method in ("lora", "hf-lora"):
        ready = prepare(setup(method, model, memory={"micro_batch_tokens": 0}), tmp_path, CPU, print)
        results.append(ready.step([few, many], 1))
        assert isinstance(ready.step, Stock) is (method == "hf-lora")
    ours, stock = results
    assert ours.losses == pytest.approx(stock.losses, rel=FIRST) and stock.losses[0] < stock.losses[1] / 3
    for result in results:
        assert (result.tokens, result.supervised, result.rows) == (32, 17, ((), ()))


def test_layers_live_where_memory_says(checkpoint, tmp_path):
    memory = {"layers_on_device": 1, "layers_on_host": 1, "activations": "host"}
    ready, found = losses(setup("qlora", checkpoint("llama"), memory=memory), Work(1, 1, 8), tmp_path, 1)
    assert ready.residency is not None
    assert ready.facts["tiers"] == ready.residency.tiers == {"device": 1, "host": 1, "file": 1}
    usual = losses(setup("qlora", checkpoint("llama")), Work(1, 1, 8), tmp_path, 1)[1]
    assert found == usual


def test_a_memory_section_that_is_none_is_said(tmp_path):
    with pytest.raises(RecipeError, match=r"qlora.*unknown key `memory\.layers_on_moon`"):
        config_of(setup("qlora", "any", memory={"layers_on_moon": 1}), tmp_path)


def test_a_shape_has_no_tokenizer_for_rows(shape):
    with pytest.raises(ModelError, match="no tokenizer"):
        batches_of(setup("qlora", shape, is_shape=True, recipe="mine.yaml"), Work(1, 1, 8), 10, NO_SOURCE, 1)


def test_only_a_gguf_file_is_converted(checkpoint, tmp_path):
    assert as_directory(str(checkpoint("llama")), print) == str(checkpoint("llama"))
    (tmp_path / "model.gguf").write_bytes(b"no")
    with pytest.raises(ModelError, match="not a GGUF file"):
        as_directory(str(tmp_path / "model.gguf"), print)
