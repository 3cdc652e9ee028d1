"""What a model's or an adapter's files may not say, and how each is refused."""

import json
import os
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.config import ModelConfig
from qlora.errors import AdapterError, ModelError
from qlora.model.adapters import load_adapter
from qlora.model.load import load_base
from qlora.model.source import config_of, open_source, read_tokenizer
from qlora.model.untrusted import PICKLES, check_config, check_implementation, read_json
from tests.tiny import chat_model

CPU = torch.device("cpu")


@pytest.fixture
def model(checkpoint, tmp_path) -> Path:
    """A tiny model with a tokenizer, to be spoiled."""
    return Path(shutil.copytree(chat_model(checkpoint), tmp_path / "model"))


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    """A LoRA of rank 4 on it, as PEFT writes it."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    made.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def opened(path):
    return open_source(ModelConfig(model_name_or_path=str(path)))


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("suffix", PICKLES)
def test_a_pickle_is_refused_by_name_before_it_is_looked_for(suffix, tmp_path):
    for path in (tmp_path / f"model{suffix}", tmp_path / f"MODEL{suffix.upper()}"):
        with pytest.raises(ModelError, match=f"{re.escape(str(path))}: pickled.*\n.*safetensors"):
            opened(path)
        with pytest.raises(ModelError, match="pickled"):
            config_of(ModelConfig(model_name_or_path=str(path)))


def test_an_adapter_that_is_only_pickled_is_refused(adapter, recipe, model):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin: pickled.*\n.*safetensors"):
        load_adapter(base(recipe, model), str(adapter))


def base(recipe, model):
    config = recipe(model, "lora")
    return load_base(config, open_source(config.model), CPU).model


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "..\\x",
        "a/b.safetensors",
        "",
        "..",
        "C:x",
        "a\0b",
        "x" * 300,
        "\ud800",
        7,
        ["x"],
    ],
)
def test_a_name_in_an_index_is_that_of_a_file_in_its_directory(name, model):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ModelError, match="outside its directory"):
        opened(model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "additional_chat_templates"])
def test_a_link_out_of_the_directory_is_refused(name, model, tmp_path):
    (elsewhere := tmp_path / "elsewhere").mkdir()
    if (model / name).exists():
        (model / name).rename(elsewhere / name)
    (model / name).symlink_to(elsewhere / name)
    with pytest.raises(ModelError, match="outside its directory"):
        opened(model)
    with pytest.raises(ModelError, match="outside its directory"):
        read_tokenizer(model)


def test_links_of_the_hubs_cache_and_within_a_directory_are_followed(model, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        shutil.copy(path, blobs / f"0{path.name}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"0{path.name}", snapshot))
    source = opened(snapshot)
    assert source.tokenizer().chat_template and source.config().model_type == "llama"
    (model / "model.safetensors").rename(model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    assert opened(model).fingerprint() == source.fingerprint()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["kernels-community/flash-attn2", "user/repo:fn", "msa|user/repo", {"": "user/repo"}])
def test_a_checkpoint_cannot_name_an_attention_from_a_repository(key, value, model, tmp_path):
    for facts in ({key: value}, {"text_config": {key: value}}, {"layers": [{"deep": {key: value}}]}):
        with pytest.raises(ModelError, match=f"`{key}` is .*downloaded and run"):
            check_config(facts, tmp_path / "config.json")
    check_config({key: value}, tmp_path / "config.json", trust_remote_code=True)
    check_config({key: "flash_attention_2"}, tmp_path / "config.json")
    change(model / "config.json", **{key: value})
    for read in (
        opened(model).config,
        opened(model).tokenizer,
        lambda: config_of(ModelConfig(model_name_or_path=str(model))),
    ):
        with pytest.raises(ModelError, match=f"`{key}`"):
            read()


@pytest.mark.parametrize(
    "facts",
    [
        {"experts_implementation": "sonicmoe"},
        {"_experts_implementation": "user/repo"},
        {"use_kernels": True},
        {"kernel_config": {"RMSNorm": "user/repo:fn"}},
        {"gguf_file": "../../x.gguf"},
        {"fast_tokenizer_files": ["tokenizer.4.0.0/../../x.json"]},
        {"num_hidden_layers": 10**9},
        {"text_config": {"num_local_experts": 10**9}},
        {"num_labels": 10**9},
    ],
    ids=str,
)
def test_other_keys_that_run_code_or_build_without_end_are_refused(facts, tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path / "config.json")):
        check_config(facts, tmp_path / "config.json")


def test_a_kernel_in_the_recipe_needs_trust(model, recipe):
    with pytest.raises(ModelError, match=r"attn_implementation.*\n.*trust_remote_code: true"):
        base(lambda *a: recipe(*a, model={"attn_implementation": "user/kernel"}), model)
    check_implementation("user/kernel", trust_remote_code=True)
    check_implementation("sdpa", trust_remote_code=False)


@pytest.mark.parametrize(
    "changes",
    [
        *({"hidden_size": size} for size in (10**12, 10**6, "64", 1.5)),
        *({"num_attention_heads": heads} for heads in (10**9, 0)),
        *({"vocab_size": 10**9}, {"intermediate_size": 10**8}, {"num_hidden_layers": 3000}),
        *({"rope_parameters": []}, {"architectures": 7}, {"dtype": "os"}),
    ],
    ids=str,
)
def test_a_configuration_that_its_files_cannot_fill_is_refused_before_it_is_built(changes, model, recipe):
    change(model / "config.json", **changes)
    try:
        base(recipe, model)
    except ModelError as error:
        assert str(model) in str(error)
    else:
        assert changes == {"architectures": 7}  # which nobody asks


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content", ["[]", "7", "{", '{"a": NaN}', '{"a": ' * 5000, '{"a":' * 90 + "1" + "}" * 90, "\xff"]
)
def test_json_that_is_none_or_no_object_or_too_deep_is_said(name, content, model, recipe):
    (model / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=re.escape(name)):
        opened(model).tokenizer()


@pytest.mark.parametrize(
    "tokens",
    [{"99999999999999": {"content": "x"}}, {"x": {"content": "y"}}, {"1": 7}, {"-5": {"content": "z"}}, 7, [1]],
    ids=str,
)
def test_absurd_added_tokens_are_an_error_of_ours_or_none(tokens, model):
    change(model / "tokenizer_config.json", added_tokens_decoder=tokens)
    try:
        read_tokenizer(model, AdapterError)
    except AdapterError as error:
        assert str(model) in str(error)


def test_a_broken_tokenizer_is_an_error_of_ours(model):
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot read its tokenizer"):
        opened(model).tokenizer()


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**12},
        {"r": True},
        {"r": "4"},
        {"rank_pattern": {"q_proj": 10**12}},
        {"megatron_config": {"a": 1}, "megatron_core": "os"},
        {"layer_replication": [[0, 10**9]]},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": "pissa_niter_100000000"},
        {"monteclora_config": {"num_samples": 10**9}},
        {"peft_type": "XLORA"},
        {"peft_type": None},
        {"target_modules": 7},
        {"task_type": "os.system"},
        {"_attn_implementation": "user/repo"},
    ],
    ids=str,
)
def test_an_adapter_that_is_more_than_lora_is_refused(changes, adapter, model, recipe):
    change(adapter / "adapter_config.json", **changes)
    with pytest.raises(AdapterError, match=re.escape(str(adapter))):
        load_adapter(base(recipe, model), str(adapter))


def test_an_adapters_library_is_not_imported(adapter, model, recipe):
    change(adapter / "adapter_config.json", auto_mapping={"base_model_class": "X", "parent_library": "antigravity"})
    assert load_adapter(base(recipe, model), str(adapter)).peft_config["default"].auto_mapping is None


def test_a_fingerprint_tells_the_weights_and_the_configuration(model):
    first = opened(model).fingerprint()
    assert first == opened(model).fingerprint()
    tensors = load_file(model / "model.safetensors")
    content = (model / "model.safetensors").read_bytes()
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file({name: t * 1.001 for name, t in tensors.items()}, model / "model.safetensors")
    assert opened(model).fingerprint() != first
    (model / "model.safetensors").write_bytes(content)
    assert opened(model).fingerprint() == first
    change(model / "config.json", rope_theta=7.0)
    assert opened(model).fingerprint() != first


@pytest.mark.parametrize("at", [0, -1])
def test_a_fingerprint_covers_the_first_and_the_last_byte(at, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(1 << 20)}, path)
    first, content = opened(tmp_path).fingerprint(), bytearray(path.read_bytes())
    content[9 if at == 0 else at] ^= 1
    source = opened(tmp_path)
    path.write_bytes(content)
    assert source.fingerprint() != first


def test_json_is_read_whole_and_infinity_with_it(tmp_path):
    (tmp_path / "config.json").write_text('{"limit": [0.0, Infinity]}')
    assert read_json(tmp_path / "config.json") == {"limit": [0.0, float("inf")]}


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-of-this-name/model"])
def test_a_name_that_cannot_be_a_path_is_said(name):
    for read in (open_source, config_of):
        with pytest.raises(ModelError):
            read(ModelConfig(model_name_or_path=name))
