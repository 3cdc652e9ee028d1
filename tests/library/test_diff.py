"""How two adapters differ: norms as PEFT's own dense changes have them, and recipes, data and figures side by side."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding, Linear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.errors import AdapterError
from qlora.library.diff import change, change_norms, diff


@pytest.fixture
def made(checkpoint, tmp_path):
    """made(name, seed, ...) -> an adapter of PEFT's with random A and B on a tiny model, and each weight's change as
    PEFT itself forms it."""

    def make(name, seed, architecture="llama", **fields):
        model = AutoModelForCausalLM.from_pretrained(checkpoint(architecture))
        adapted = get_peft_model(model, LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8} | fields)))
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(generator=generator)
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name, dense(adapted)

    return make


def dense(adapted: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").double()
        for name, module in adapted.named_modules()
        if isinstance(module, Linear | Embedding)
    }


PAIRS = {
    "the same targets": ({}, {}),
    "other ranks and scalings": ({"r": 2, "lora_alpha": 32}, {"r": 8, "use_rslora": True}),
    "other targets": ({"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*v_proj": 3}},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 6}, "use_rslora": True},
    ),
    "an embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens"]}),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.filterwarnings("ignore:.*embedding.*")
def test_norms_are_those_of_the_dense_changes_that_peft_forms(pair, made):
    (a, one), (b, two) = (made(name, seed, **PAIRS[pair][seed]) for seed, name in enumerate("ab"))
    found, notes = change(a, b)
    assert {each.name for each in found} == {*one, *two} and not [n for n in notes if "left out" in n]
    for each in found:
        first, second = one.get(each.name, torch.zeros(1)), two.get(each.name, torch.zeros(1))
        # PEFT forms the product in fp32
        assert each.a == pytest.approx(first.norm().item(), rel=1e-5)
        assert each.b == pytest.approx(second.norm().item(), rel=1e-5)
        assert each.difference == pytest.approx((first - second).norm().item(), rel=1e-5)


def test_by_layer_by_kind_and_all_together_are_the_norms_of_the_weights_in_them(made):
    (a, one), (b, two) = made("a", 0), made("b", 1)
    found = diff(a, b)
    assert [each.name for each in found.layers] == ["0", "1", "2"]
    assert {each.name for each in found.kinds} == {"q_proj", "v_proj"}
    for each in (*found.layers, *found.kinds, found.total):
        inside = [name for name in one if each.name == "all" or each.name in name.split(".")]
        norm = torch.cat([(one[name] - two[name]).flatten() for name in inside]).norm().item()
        assert each.difference == pytest.approx(norm, rel=1e-5)
        assert each.relative == each.difference / each.a


def test_an_adapter_differs_from_itself_by_nothing_and_from_a_hair_by_a_hair(made):
    a, _ = made("a", 0)
    path = a / "adapter_model.safetensors"
    assert diff(a, a).total.difference < 1e-7 * diff(a, a).total.a  # rounding of fp64, squared
    b = a.with_name("b")
    b.mkdir()
    (b / "adapter_config.json").write_bytes((a / "adapter_config.json").read_bytes())
    weights = {n: t.double() * (1 + 1e-4 * ("lora_B" in n)) for n, t in load_file(path).items()}
    save_file(weights, b / "adapter_model.safetensors")
    assert diff(a, b).total.relative == pytest.approx(1e-4, rel=1e-5)


def test_a_weight_of_any_size_takes_products_of_ranks_alone():
    """A change of 200,000 x 100,000 would have 160 GB."""
    A, B = torch.ones(2, 100_000), torch.ones(200_000, 2)
    a, b, difference = change_norms((A, B, 0.5), (A[:1], B[:, :1], 0.5))
    assert a == pytest.approx((100_000 * 200_000) ** 0.5) and b == pytest.approx(a / 2)
    assert difference == pytest.approx(a / 2)


def test_a_change_of_nothing_has_no_relative_difference():
    A, B = torch.ones(2, 8), torch.zeros(6, 2)
    assert change_norms((A, B, 1.0), None) == (0, 0, 0)
    assert change_norms(None, (A, B + 1, 1.0))[1:] == (change_norms(None, (A, B + 1, 1.0))[2],) * 2


def test_adapters_for_bases_of_other_shapes_are_an_error_that_names_the_weight(made):
    a, _ = made("a", 0)
    b, _ = made("b", 0, "qwen3", target_modules=["q_proj"])
    weights = load_file(b / "adapter_model.safetensors")
    save_file(
        {n: t[:, :8].clone() if "lora_A" in n else t for n, t in weights.items()}, b / "adapter_model.safetensors"
    )
    with pytest.raises(AdapterError, match=r"are for different bases: model.layers.0.self_attn.q_proj has 64 x 64"):
        diff(a, b)


def test_what_the_comparison_leaves_out_is_said(made):
    a, _ = made("a", 0, modules_to_save=["lm_head"])
    b, _ = made("b", 1)
    config = json.loads((b / "adapter_config.json").read_text())
    (b / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"q_proj": 3}}))  # not what is there
    notes = "\n".join(diff(a, b).notes)
    assert "1 tensors beside LoRA's are not compared" in notes and "3 weights are left out" in notes


def test_recipes_are_compared_with_their_defaults_and_figures_side_by_side(made):
    (a, _), (b, _) = made("a", 0), made("b", 1)
    recipe = "model: {model_name_or_path: base}\ndata: {datasets: [{path: rows.jsonl}]}\n"
    (a / "recipe.yaml").write_text(recipe)
    (b / "recipe.yaml").write_text(recipe + "lora: {r: 64}\ntraining: {learning_rate: 2e-4, seed: 7}\n")
    (a / "run.json").write_text(json.dumps({"measured": {"eval_loss": 0.5, "planned": {"seconds": 2}}}))
    (b / "run.json").write_text(json.dumps({"measured": {"eval_loss": 0.25}, "data_sha256": "d"}))
    found = diff(a, b)
    assert found.recipe == {"lora.r": (16, 64), "training.seed": (42, 7)}  # that learning rate is the default
    assert found.metrics == {"eval_loss": (0.5, 0.25), "planned.seconds": (2, None)}
    assert [facts.data_sha256 for facts in found.facts] == [None, "d"]


def test_an_adapter_without_a_recipe_is_compared_in_all_else(made):
    (a, _), (b, _) = made("a", 0), made("b", 1)
    (a / "recipe.yaml").write_text("lerning_rate: 1")
    found = diff(a, b)
    assert found.recipe is None and found.total.a > 0
