"""Adapters as one: what PEFT itself makes of them on a whole model, and what it would get wrong in silence is right."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding, Linear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora import durable
from qlora.errors import AdapterError
from qlora.library.combine import METHODS, combine, facts_of, plan
from qlora.library.registry import Registry
from tests.data.conftest import CHATML, build_tokenizer


@pytest.fixture
def made(checkpoint, tmp_path):
    """made(name, seed, ...) -> an adapter of PEFT's with random A and B, by the tiny model that it is for."""

    def make(name, seed, architecture="llama", **fields):
        model = AutoModelForCausalLM.from_pretrained(checkpoint(architecture))
        adapted = get_peft_model(model, LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8} | fields)))
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(generator=generator)
        adapted.save_pretrained(tmp_path / name, save_embedding_layers=False)  # those are the base's
        return tmp_path / name

    return make


def combined(tmp_path, *words, **how):
    """Where the combination of adapters in tmp_path lies."""
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    with durable.new_directory(out) as draft:
        combine(plan([str(tmp_path / word) for word in words], Registry().resolve, out, **how), draft)
        draft.adopt()
    return out


def changes(path, checkpoint, *more):
    """What an adapter does to each weight, as PEFT loads it and forms it; `more` adapters stand beside it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint("llama")), path)
    for name, other in more:
        model.load_adapter(other, name)
    return dense(model, "default"), model


def dense(model, name):
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Linear | Embedding)}
    there = {path: m for path, m in layers.items() if name in m.lora_A or name in m.lora_embedding_A}
    return {path: module.get_delta_weight(name).double() for path, module in there.items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        # fp32, and a decomposition for some methods
        assert torch.allclose(found[name], change, rtol=0, atol=2e-5 * change.norm().item()), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:The density")
def test_it_is_what_peft_makes_on_the_whole_model(method, made, checkpoint, tmp_path):
    made("a", 0, target_modules=["q_proj", "v_proj"])
    made("b", 1, target_modules=["q_proj", "up_proj"], lora_alpha=3)
    # A density of 1 leaves nothing to the draws, in which the two need not agree.
    density = {"density": 1.0 if "dare" in method else 0.3} if method not in ("cat", "svd", "linear") else {}
    found, _ = changes(combined(tmp_path, "a:0.6", "b:-0.4", method=method, **density), checkpoint)
    _, model = changes(tmp_path / "a", checkpoint, ("b", tmp_path / "b"))
    model.add_weighted_adapter(["default", "b"], [0.6, -0.4], "both", combination_type=method, **density)
    same(found, dense(model, "both"))


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.filterwarnings("ignore:.*embedding.*")
def test_cat_is_the_weighted_sum_whatever_their_ranks_scalings_and_layers(order, made, checkpoint, tmp_path):
    made("a", 0, use_rslora=True, rank_pattern={"q_proj": 6}, target_modules=["q_proj", "v_proj", "embed_tokens"])
    made("b", 1, layers_to_transform=[1], alpha_pattern={"v_proj": 5}, target_modules=["q_proj", "v_proj"])
    weights = {"a": 0.5, "b": 2.0}
    found, _ = changes(combined(tmp_path, *(f"{name}:{weights[name]}" for name in order)), checkpoint)
    parts = {name: changes(tmp_path / name, checkpoint)[0] for name in order}
    names = {name for each in parts.values() for name in each}
    same(found, {n: sum(weights[k] * each[n] for k, each in parts.items() if n in each) for n in names})


def test_svd_of_all_ranks_is_the_sum_and_a_rank_past_a_weights_own_is_padded(made, checkpoint, tmp_path):
    made("a", 0, target_modules=["k_proj"])  # 32 x 64
    made("b", 1, target_modules=["k_proj", "q_proj"], r=5)
    found, _ = changes(combined(tmp_path, "a", "b", method="svd", rank=40), checkpoint)
    parts = [changes(tmp_path / name, checkpoint)[0] for name in "ab"]
    same(found, {n: sum(each[n] for each in parts if n in each) for n in parts[1]})
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 40


def test_what_is_left_to_chance_is_the_seeds_alone(made, tmp_path):
    made("a", 0)
    made("b", 1)
    how = {"method": "dare_linear", "density": 0.5}
    weights = []
    for seed in (1, 1, 2):
        torch.rand(seed)  # whatever was drawn before
        weights.append(load_file(combined(tmp_path, "a", "b", seed=seed, **how) / "adapter_model.safetensors"))
    one, again, other = weights
    assert all(torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name]) for name in one)
    first, second = (one[f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_A.weight"] for n in (0, 1))
    assert not torch.equal(first == 0, second == 0)  # each weight has draws of its own


def test_how_far_it_is_from_the_weighted_sum_is_said(made, tmp_path):
    made("a", 0)
    made("b", 1)
    away = {}
    for method in ("cat", "svd", "linear"):
        with durable.new_directory(tmp_path / method) as draft:
            words = [str(tmp_path / name) for name in "ab"]
            away[method] = combine(plan(words, Registry().resolve, method=method), draft)
    assert away["cat"] < 1e-6 < 0.1 < away["svd"] < 0.8 < away["linear"]


def test_the_tokenizer_and_recipe_come_along_and_the_template_that_differs_is_noted(made, tmp_path):
    a, b = made("a", 0), made("b", 1)
    tokenizer = build_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    tokenizer.save_pretrained(a)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(b)
    (a / "recipe.yaml").write_text("model: {model_name_or_path: base}\n")
    out = combined(tmp_path, "a", "b")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (a / name).read_bytes()
    assert (out / "recipe.yaml").read_text().startswith("# Of a, the first") and not (out / "events.jsonl").exists()
    notes = plan([str(a), str(b)], Registry().resolve).notes
    assert notes == ["b was trained with another chat template; the combination has that of a"]
    build_tokenizer(CHATML, ("<|other|>", "<|im_end|>"), eos="<|im_end|>").save_pretrained(b)
    with pytest.raises(AdapterError, match="b: its tokenizer has other tokens than that of a"):
        plan([str(a), str(b)], Registry().resolve)


def test_what_follows_the_last_colon_is_a_weight_if_it_is_a_number(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library = Registry(tmp_path / "home")
    library.add(made("a", 0), "orders", "v1")
    library.add(made("b", 1), "forms")
    found = plan(["orders:v1:0.5", "forms", f"{made('c', 2)}:-1e-1"], library.resolve)
    assert [(share.name, share.weight) for share in found.shares] == [("orders-v1", 0.5), ("forms", 1.0), ("c", -0.1)]
    assert (found.rank, found.seed, found.density) == (12, None, None)
    with pytest.raises(AdapterError, match=r"(?s)orders:half: no such version.*`half` is no number.*orders:0\.6"):
        plan(["orders:half", "forms"], library.resolve)


@pytest.mark.parametrize("weight", ["1e300", "-1e7", "1e-300"])
def test_a_weight_that_leaves_nothing_but_one_adapter_is_refused(weight, made, tmp_path):
    with pytest.raises(AdapterError, match=f"a:{weight}: a weight is 1e-06 to 1,000,000, or minus that: .*a:0.6"):
        plan([f"{made('a', 0)}:{weight}", str(made("b", 1))], Registry().resolve)


def test_what_is_not_finite_once_it_is_combined_is_no_adapter(made, tmp_path):
    for name in "ab":
        path = made(name, 0) / "adapter_model.safetensors"
        save_file({key: torch.full_like(t, 3e38) for key, t in load_file(path).items()}, path)
    how = plan([str(tmp_path / "a"), str(tmp_path / "b")], Registry().resolve, method="linear")
    broken = pytest.raises(AdapterError, match="combined by linear, it has values that are not finite")
    with broken, durable.new_directory(tmp_path / "c") as draft:
        combine(how, draft)
    assert not (tmp_path / "c").exists()


def test_an_adapter_that_is_not_what_its_run_wrote_is_not_combined(made, tmp_path):
    a, b = made("a", 0), made("b", 1)
    (a / "run.json").write_text(json.dumps({"files": {"adapter_model.safetensors": {"size": 1, "sha256": "0" * 64}}}))
    with pytest.raises(AdapterError, match=r"a: adapter_model\.safetensors is not what its run wrote"):
        plan([str(a), str(b)], Registry().resolve)


def test_all_that_is_wrong_is_one_message(made, tmp_path):
    made("a", 0)
    made("b", 1, use_dora=True)
    made("c", 2, modules_to_save=["lm_head"])
    words = [f"{tmp_path}/a:nan", f"{tmp_path}/b:0", f"{tmp_path}/c", f"{tmp_path}/a", f"{tmp_path}/d:1"]
    with pytest.raises(AdapterError) as caught:
        plan(words, Registry().resolve, tmp_path, method="mean", density=2, rank=0, seed=1)
    for said in (
        "a:nan: a weight is 1e-06 to 1,000,000, or minus that",
        "b:0: a weight is",
        "the same adapter as a; give it once",
        "d'",
        "b: cannot be combined: `use_dora`",
        "c: cannot be combined: `modules_to_save`",
        f"--out {tmp_path}: is there already",
        "--method mean: PEFT has\n  cat, svd, linear",
        "--density 2",
        "--rank 0",
        "--seed 1",
    ):
        assert said in str(caught.value)
    with pytest.raises(AdapterError, match="one adapter alone"):
        plan([f"{tmp_path}/a"], Registry().resolve)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bias": "lora_only"}, "`bias`"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights`: pissa changes the base"),
        ({"init_lora_weights": "orthogonal"}, "`init_lora_weights`"),
        ({"lora_bias": True}, "`lora_bias`|beside LoRA's"),
    ],
)
def test_what_is_more_than_lora_cannot_be_combined(fields, said, made, tmp_path):
    made("a", 0)
    made("b", 1, **fields)
    with pytest.raises(AdapterError, match=rf"b: cannot be combined: .*({said})"):
        plan([str(tmp_path / "a"), str(tmp_path / "b")], Registry().resolve)


def test_other_ranks_are_refused_with_the_methods_that_can(made, tmp_path):
    made("a", 0)
    made("b", 1, r=8)
    words = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(AdapterError, match=r"(?s)q_proj has 4 in a, 8 in b\n.*cat, svd or one that ends in _svd"):
        plan(words, Registry().resolve, method="ties")
    assert [plan(words, Registry().resolve, method=m).rank for m in ("cat", "svd", "ties_svd")] == [12, 8, 8]


def test_another_base_is_found_by_fingerprint_by_name_and_by_shape(made, tmp_path):
    a, b = made("a", 0), made("b", 1)
    words = [str(a), str(b)]
    run = {"base": {"fingerprint": "1"}}
    for path in (a, b):
        (path / "run.json").write_text(json.dumps(run))
    config = json.loads((b / "adapter_config.json").read_text())
    (b / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "moved"}))
    plan(words, Registry().resolve)  # the weights are the same
    (b / "run.json").unlink()
    with pytest.raises(AdapterError, match="b: for another base than a: moved, not "):
        plan(words, Registry().resolve)
    (b / "adapter_config.json").write_text(json.dumps(config))
    (b / "run.json").write_text(json.dumps({"base": {"fingerprint": "2"}}))
    with pytest.raises(AdapterError, match="the names are the same, the weights are not"):
        plan(words, Registry().resolve)
    weights = load_file(b / "adapter_model.safetensors")
    weights = {n: t[:, :8].clone() if "lora_A" in n else t for n, t in weights.items()}
    save_file(weights, b / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"q_proj is 64 x 64 in a, 64 x 8 in b \(and 5 more\)"):
        plan(words, Registry().resolve)


def test_values_that_are_not_finite_are_named(made, tmp_path):
    a, b = made("a", 0), made("b", 1)
    weights = load_file(b / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, b / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"b: has values that are not finite in model\.layers\.0"):
        plan([str(a), str(b)], Registry().resolve)


def test_the_lineage_has_each_adapter_with_its_weight(made, tmp_path):
    made("a", 0)
    made("b", 1)
    how = plan([f"{tmp_path}/a:0.6", f"{tmp_path}/b:0.4"], Registry().resolve, method="dare_ties", seed=3)
    assert facts_of(how, {"a": "1", "b": "2"}) == {
        "combined_from": [{"name": "a", "sha256": "1", "weight": 0.6}, {"name": "b", "sha256": "2", "weight": 0.4}],
        "combined_by": {"method": "dare_ties", "density": 0.5, "rank": 4, "seed": 3},
    }
