"""The adapter: PEFT's arithmetic, PEFT's files, on our frozen linear."""

import copy

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.errors import AdapterError
from qlora.model.adapters import FrozenLora, FusedLoraLinear, attach, load_adapter, trainable
from qlora.model.load import load_base
from qlora.model.nf4 import four_bit_weights
from qlora.model.source import open_source
from tests.conftest import random_batch

CPU = torch.device("cpu")


def base(config):
    return load_base(config, open_source(config.model), CPU).model


def stir(model, seed=1):
    """Make an adapter that does something: a new one has B = 0."""
    g = torch.Generator().manual_seed(seed)
    for parameter in trainable(model).values():
        parameter.data += torch.randn(parameter.shape, generator=g) * 0.05


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch.input_ids).logits


@pytest.mark.parametrize("same", [True, False], ids=["no dropout", "dropout"])
def test_the_fused_function_has_the_gradients_of_its_formula(same):
    torch.manual_seed(0)
    x, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5, 8), (3, 8), (6, 3)))
    w, bias = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    keep = torch.ones(8, dtype=torch.float64) if same else torch.tensor([0.0, 2.0] * 4, dtype=torch.float64)

    def fused(x, a, b):
        dropped = x if same else x * keep
        return FrozenLora.apply(x, dropped, a, b, bias, lambda: w, 1.7)

    assert torch.allclose(fused(x, a, b), x @ w.t() + bias + 1.7 * (x * keep) @ a.t() @ b.t())
    assert torch.autograd.gradcheck(fused, (x, a, b))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fused_forward_is_no_further_from_the_truth_than_pefts(dtype, checkpoint, recipe):
    """Truth: the same base and adapter in float64."""
    config = recipe(checkpoint("llama"), "lora", model={"dtype": dtype})
    model = attach(base(config), config.lora, seed=0)
    stir(model)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    assert type(layer) is FusedLoraLinear
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    truth = copy.deepcopy(layer).double()(x.double())
    with torch.no_grad():
        ours, theirs = layer(x), PeftLoraLinear.forward(layer, x)
    # Ours rounds the adapter's factors to x's dtype, PEFT's adds the two halves after rounding each: alike, not equal.
    assert (ours - truth).abs().mean() <= 1.5 * (theirs - truth).abs().mean()


def test_nothing_dense_is_kept_between_forward_and_backward(checkpoint, recipe):
    config = recipe(checkpoint("llama"))
    model = attach(base(config), config.lora, seed=0)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(5, 128, requires_grad=True))
    assert kept
    assert all(tensor.numel() < 64 * 128 for tensor in kept)


def test_a_saved_adapter_gives_the_same_logits_through_peft_on_a_bitsandbytes_base(checkpoint, recipe, tmp_path):
    path, batch = checkpoint("llama"), random_batch(2)
    config = recipe(path)
    model = attach(base(config), config.lora, seed=0)
    stir(model)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    stock = AutoModelForCausalLM.from_pretrained(path, quantization_config=how, dtype=torch.float32)
    # As in training: without gradients bitsandbytes' CPU kernels compute in bf16 whatever compute_dtype says.
    stock.train()
    stock.enable_input_require_grads()
    without = stock(input_ids=batch.input_ids).logits
    found = peft.PeftModel.from_pretrained(stock, tmp_path).train()(input_ids=batch.input_ids).logits
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max())
    assert not torch.allclose(without, expected, atol=1e-2 * expected.abs().max())


def test_an_adapter_of_plain_peft_loads_here(checkpoint, recipe, tmp_path):
    path, batch = checkpoint("qwen2"), random_batch(2)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    stock = peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    stir(stock)
    stock.save_pretrained(tmp_path)
    found = load_adapter(base(recipe(path, "lora")), str(tmp_path))
    assert torch.allclose(logits(found, batch), logits(stock, batch), atol=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2}},
        {"bias": "all"},
    ],
    ids=str,
)
def test_what_peft_can_do_trains_on_a_four_bit_base(how, checkpoint, recipe):
    config = recipe(checkpoint("qwen2"), lora=how)
    untouched = base(config)
    batch = random_batch(2)
    before = logits(untouched, batch)
    model = attach(untouched, config.lora, seed=0)
    off = (logits(model, batch) - before).abs().mean()
    if how.get("init_lora_weights") in ("pissa", "olora"):
        # Part of the base moved into the adapter, and the rest was rounded again: as far off as NF4 itself is.
        sixteen_bits = logits(base(recipe(checkpoint("qwen2"), "lora")), batch)
        assert off < 1.5 * (before - sixteen_bits).abs().mean()
    else:
        assert off < 1e-5
    model(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
    assert all(p.grad is not None for p in trainable(model).values())
    assert len(four_bit_weights(model)) == 3 * 7


def test_pissa_leaves_the_residual_in_the_base(checkpoint, recipe):
    config = recipe(checkpoint("llama"), lora={"init_lora_weights": "pissa"})
    plain = base(config).model.layers[0].mlp.up_proj.weight
    layer = attach(base(config), config.lora, seed=0).get_base_model().model.layers[0].mlp.up_proj
    residual = plain - layer.get_delta_weight("default")
    assert (layer.base_layer.weight - residual).abs().mean() < 0.11 * residual.std()
    assert (layer.base_layer.weight - plain).abs().mean() > 0.3 * plain.std()


def test_master_weights_are_fp32_unless_pure_bf16_is_asked_for(checkpoint, recipe):
    for cast, expected in ((True, torch.float32), (False, torch.bfloat16)):
        config = recipe(checkpoint("llama"), model={"dtype": "bfloat16"}, lora={"autocast_adapter_dtype": cast})
        model = attach(base(config), config.lora, seed=0)
        assert {p.dtype for p in trainable(model).values()} == {expected}
        assert logits(model, random_batch()).dtype == torch.bfloat16


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_generator_alone(checkpoint, recipe):
    config = recipe(checkpoint("llama"))
    state = torch.get_rng_state()
    first, again, other = (trainable(attach(base(config), config.lora, seed)) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_a_lora_section_that_does_not_fit_the_model_is_said(checkpoint, recipe):
    config = recipe(checkpoint("llama"), lora={"target_modules": ["c_attn"]})
    with pytest.raises(AdapterError, match="c_attn"):
        attach(base(config), config.lora, seed=0)


@pytest.mark.parametrize(
    ("method", "asked", "said"),
    [
        (
            "qlora",
            {"target_parameters": ["mlp.experts.down_proj"]},
            "down_proj: stacked in four bits.* `method: lora` has",
        ),
        ("qlora", {"target_modules": ["q_proj", "w2"]}, "down_proj: stacked in four bits"),  # as Mixtral had them
        ("qlora", {"target_parameters": ["w2.weight"]}, "w2.weight: no such parameter"),
        ("lora", {"target_modules": ["q_proj"], "target_parameters": ["w2.weight"]}, "w2.weight: no such parameter"),
    ],
    ids=str,
)
def test_experts_that_would_get_no_adapter_in_silence_are_refused(method, asked, said, checkpoint, recipe):
    config = recipe(checkpoint("mixtral"), method, lora={"target_modules": ["q_proj"]} | asked)
    with pytest.raises(AdapterError, match=f"`lora` section does not fit the model: no LoRA for .*{said}"):
        attach(base(config), config.lora, seed=0)


def test_an_adapter_of_experts_is_not_loaded_without_them_on_a_four_bit_base(checkpoint, recipe, tmp_path):
    config = recipe(checkpoint("mixtral"), "lora", lora={"target_parameters": ["mlp.experts.down_proj"]})
    attach(base(config), config.lora, seed=0).save_pretrained(tmp_path)
    assert load_adapter(base(config), str(tmp_path))
    with pytest.raises(AdapterError, match=r"no LoRA for .*: stacked in four bits"):
        load_adapter(base(recipe(checkpoint("mixtral"))), str(tmp_path))


def test_all_linear_on_stacked_experts_in_four_bits_says_that_it_is_not_on_them_and_what_it_is_on(
    checkpoint, recipe, tmp_path
):
    config, batch = recipe(checkpoint("mixtral")), random_batch(2)
    with pytest.warns(UserWarning, match="no LoRA on .*gate_up_proj: PEFT has none for experts"):
        model = attach(base(config), config.lora, seed=0)
    stir(model)
    model.save_pretrained(tmp_path)
    saved = peft.LoraConfig.from_pretrained(tmp_path)
    assert saved.target_parameters == ["gate.weight"] and not saved.rank_pattern
    assert torch.equal(logits(load_adapter(base(config), str(tmp_path)), batch), logits(model, batch))


def test_a_directory_without_an_adapter_is_said(checkpoint, recipe, tmp_path):
    with pytest.raises(AdapterError, match="not a LoRA adapter"):
        load_adapter(base(recipe(checkpoint("llama"))), str(tmp_path))
