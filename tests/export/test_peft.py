"""What is exported as PEFT: the adapter to the bit, and where it comes from told in its weights' file."""

import json
import re
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora import durable, run
from qlora.errors import AdapterError, MachineError
from qlora.export.certificate import Certificate, Fidelity
from qlora.export.peft import export_peft
from qlora.library.registry import Registry
from qlora.recipe import parse_recipe
from tests import disk_faults, tiny

WEIGHTS = "adapter_model.safetensors"
CERTIFICATE = Certificate(2, 10, 1.0, 2.0, {"original": Fidelity(0.02, 0.99, 1.0)}, "original")


@pytest.fixture(scope="module")
def model(checkpoint):
    return tiny.chat_model(checkpoint, "qwen2")


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """The directory that a run left, with another run's checkpoints and log in it. Its head was trained whole."""
    directory = tmp_path_factory.mktemp("trained")
    lora = {"modules_to_save": ["lm_head"]}
    run.train(tiny.recipe(model, directory, lora=lora, training={"max_steps": 2, "save_steps": 1}), sinks=[])
    return directory / "out"


@pytest.fixture(scope="module")
def elsewhere(model, tmp_path_factory):
    """What PEFT alone leaves."""
    directory = tmp_path_factory.mktemp("elsewhere") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def logits(model, adapter):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(adapter)).eval()(input_ids=torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("which", ["trained", "elsewhere"])
def test_peft_loads_the_very_adapter_with_its_tokenizer(which, model, tokenizer, tmp_path, request):
    adapter, out = request.getfixturevalue(which), tmp_path / "out"
    export_peft(adapter, out, tokenizer, "it")
    before, after = load_file(adapter / WEIGHTS), load_file(out / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model, out), logits(model, adapter))
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    durable.verify(out)


def test_names_and_configuration_are_those_that_vllm_reads(trained, elsewhere, tokenizer, tmp_path):
    for adapter in (trained, elsewhere):
        out = tmp_path / adapter.name
        export_peft(adapter, out, tokenizer, "it")
        config = json.loads((out / "adapter_config.json").read_text())
        assert config == json.loads((adapter / "adapter_config.json").read_text())
        # What vLLM's PEFTHelper requires; ranks and modules that it takes.
        assert {"r", "lora_alpha", "target_modules"} <= config.keys() and config["peft_type"] == "LORA"
        assert isinstance(config["target_modules"], list)
        # vLLM's parse_fine_tuned_lora_name: a module's path, then which of the two it is.
        name = r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj\.lora_[AB]\.weight"
        others = [each for each in load_file(out / WEIGHTS) if not re.fullmatch(name, each)]
        # A head that was trained is there, and of the base nothing else.
        assert others == (["base_model.model.lm_head.weight"] if adapter is trained else [])


def test_the_weights_file_alone_tells_where_it_comes_from(trained, tokenizer, tmp_path):
    export_peft(trained, tmp_path / "out", tokenizer, "it")
    told, facts = header(tmp_path / "out" / WEIGHTS), json.loads((trained / "run.json").read_text())
    assert told.keys() == {"format", "base", "recipe", "measured", "versions", "data_sha256"}
    assert told["format"] == "pt" and told["data_sha256"] == facts["data_sha256"]
    config = json.loads((trained / "adapter_config.json").read_text())
    assert json.loads(told["base"]) == {"name": config["base_model_name_or_path"], **facts["base"]}
    assert re.fullmatch("[0-9a-f]{64}", json.loads(told["base"])["fingerprint"])
    assert json.loads(told["measured"]) == facts["measured"] and json.loads(told["versions"]) == facts["versions"]
    assert parse_recipe(told["recipe"]).lora.modules_to_save == ["lm_head"]


def test_of_an_adapter_from_elsewhere_what_is_known_is_told(elsewhere, model, tokenizer, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(elsewhere, bare, ignore=shutil.ignore_patterns("README.md"))
    export_peft(bare, tmp_path / "out", tokenizer, "my-adapter")
    told = header(tmp_path / "out" / WEIGHTS)
    assert json.loads(told.pop("base")) == {"name": str(model), "revision": None} and told == {"format": "pt"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.split("---\n")[2].startswith(f"# my-adapter\n\nA LoRA adapter for `{model}`.\n")
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"
    assert not (tmp_path / "out" / "run.json").exists()


def test_only_the_adapter_is_there_and_the_library_takes_it(trained, tokenizer, tmp_path):
    out = tmp_path / "out"
    export_peft(trained, out, tokenizer, "it")
    assert list(trained.glob("checkpoint-*")) and (trained / "events.jsonl").is_file()
    assert {path.name for path in out.iterdir()} == {
        *("adapter_config.json", WEIGHTS, "README.md", "recipe.yaml", "run.json", "manifest.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    registry = Registry(tmp_path / "library")
    assert registry.facts(registry.add(out, "mine")).data_sha256  # its run.json has the hashes of these files


def test_an_export_can_be_exported_again(trained, tokenizer, tmp_path):
    export_peft(trained, tmp_path / "one", tokenizer, "it", CERTIFICATE)
    export_peft(tmp_path / "one", tmp_path / "two", tokenizer, "it", CERTIFICATE)
    assert durable.verify(tmp_path / "one") == durable.verify(tmp_path / "two")


def test_the_card_has_the_certificate_of_the_merged_model_once(trained, elsewhere, tokenizer, tmp_path):
    for adapter in (trained, elsewhere):
        out = tmp_path / adapter.name
        for _ in range(2):
            export_peft(adapter, out, tokenizer, "it", CERTIFICATE)
        card = (out / "README.md").read_text()
        assert card.count(CERTIFICATE.block()) == card.count("## Fidelity certificate") == 1
        before = (adapter / "README.md").read_text()
        assert card.replace(CERTIFICATE.block(), "").split() == before.split()


def test_no_secret_is_in_what_is_exported(trained, elsewhere, tokenizer, tmp_path, monkeypatch):
    canary = "c4nary-of-the-export"
    monkeypatch.setenv("HF_TOKEN", canary)
    adapter = tmp_path / "adapter"
    shutil.copytree(elsewhere, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"https://me:{canary}@hub/model"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "run.json").write_text(json.dumps({"measured": {"note": canary}}))
    (adapter / "recipe.yaml").write_text(f"model: {{model_name_or_path: {canary}}}\n")
    (adapter / "README.md").write_text(f"# {canary}\n")
    export_peft(adapter, tmp_path / "out", tokenizer, "it")
    assert header(tmp_path / "out" / WEIGHTS)["measured"] == '{"note": "***"}'
    for path in (tmp_path / "out").iterdir():
        assert canary.encode() not in path.read_bytes(), path.name


def test_bad_adapters_are_refused_and_nothing_of_others_is_replaced(trained, elsewhere, tokenizer, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(AdapterError, match="no adapter_config"):
        export_peft(tmp_path, out, tokenizer, "it")
    broken = tmp_path / "broken"
    shutil.copytree(elsewhere, broken)
    (broken / WEIGHTS).write_bytes((broken / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(AdapterError, match="truncated"):
        export_peft(broken, out, tokenizer, "it")
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match="something else"):
        export_peft(trained, out, tokenizer, "it")
    assert (out / "notes.txt").read_text() == "mine"


def test_a_disk_that_is_full_at_any_call_leaves_no_half_of_it(elsewhere, tokenizer, tmp_path):
    with disk_faults.Calls().heard() as calls:
        export_peft(elsewhere, tmp_path / "whole", tokenizer, "it")
    refused = 0
    for at in range(len(calls.names)):
        out = tmp_path / f"out{at}"
        with disk_faults.Calls(at, disk_faults.full).heard():
            try:
                export_peft(elsewhere, out, tokenizer, "it")
            except MachineError as error:
                assert "No space left on device" in str(error)
                refused += 1
        assert not out.exists() or durable.verify(out)
        if calls.names[at] not in ("unlink", "rmdir"):  # or the disk did not let it tidy up
            assert not list(tmp_path.glob(f".out{at}.*"))
    assert refused > 10


def test_the_runs_own_weights_have_no_time_or_place_in_them(trained):
    assert header(trained / WEIGHTS) == {"format": "pt"}
