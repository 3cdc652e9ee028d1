"""What a run leaves: a directory that PEFT loads, with all that is needed to use it and to trust it."""

import json
import re
from types import SimpleNamespace

import peft
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora import run
from qlora.data.chat import render_prompt
from qlora.errors import AdapterError
from qlora.export import adapter as export
from qlora.model.adapters import attach, load_adapter
from qlora.model.load import load_base
from qlora.model.source import open_source
from qlora.recipe import load_recipe
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """A run over two epochs with held-out rows: its recipe, its directory, its events."""
    directory = tmp_path_factory.mktemp("trained")
    held_out = tiny.write_rows(directory / "held_out.jsonl", tiny.PAIRS[:3])
    config = tiny.recipe(
        tiny.chat_model(checkpoint, "qwen2"),
        directory,
        data={"eval_datasets": [{"path": str(held_out)}]},
        training={"num_train_epochs": 2.0},
    )
    events = []
    run.train(config, sinks=[events.append])
    return SimpleNamespace(config=config, output=directory / "out", events=events)


def through_peft(trained):
    """The adapter as anyone would load it, without us."""
    base = AutoModelForCausalLM.from_pretrained(trained.config.model.model_name_or_path, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(trained.output)).eval()


def test_peft_and_transformers_alone_find_the_held_out_loss_that_the_run_measured(trained):
    [measured] = [event["eval_loss"] for event in trained.events if event["event"] == "evaluation"]
    model, tokenizer = through_peft(trained), AutoTokenizer.from_pretrained(trained.output)
    total, count = 0.0, 0
    for asked, said in tiny.PAIRS[:3]:
        prompt = render_prompt(tokenizer, [{"role": "user", "content": asked}])
        learned = tokenizer.encode(f"{said}<|im_end|>", add_special_tokens=False)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *learned]])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(learned), reduction="sum").item()
        count += len(learned)
    # Other kernels and another order of fp32 sums.
    assert measured == pytest.approx(total / count, rel=1e-4)


def test_peft_and_transformers_alone_have_the_logits_that_we_have(trained):
    ids = torch.arange(3, 40)[None]
    ours = load_base(trained.config, open_source(trained.config.model), CPU).model
    with torch.no_grad():
        without = ours(input_ids=ids).logits
        found = load_adapter(ours, str(trained.output)).eval()(input_ids=ids).logits
        expected = through_peft(trained)(input_ids=ids).logits
    # Our forward adds the adapter to the base's product in one kernel: fp32 rounding of logits up to about 20.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - without).abs().max() > 0.1  # or the adapter would not be in it


def test_the_directory_has_the_tokenizer_with_the_template_that_was_trained(trained):
    there = AutoTokenizer.from_pretrained(trained.output)
    base = AutoTokenizer.from_pretrained(trained.config.model.model_name_or_path)
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    assert there.chat_template == base.chat_template
    assert there.apply_chat_template(chat) == base.apply_chat_template(chat)


def test_the_recipe_beside_the_adapter_is_the_one_it_was_made_by(trained):
    assert load_recipe(trained.output / "recipe.yaml") == trained.config


def test_the_facts_are_what_the_run_measured_and_was_made_of(trained):
    facts = json.loads((trained.output / export.RUN_FILE).read_text())
    end = next(event for event in trained.events if event["event"] == "end")
    measured = facts["measured"]
    assert {key: measured[key] for key in end.keys() - {"event", "time"}} == {
        key: value for key, value in end.items() if key not in ("event", "time")
    }
    assert measured["eval_loss"] == next(e["eval_loss"] for e in trained.events if e["event"] == "evaluation")
    assert re.fullmatch("[0-9a-f]{64}", facts["data_sha256"])
    assert facts["versions"]["peft"] == peft.__version__
    assert facts["versions"].keys() == {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"}


def parsed(card):
    """A model card's metadata and its text."""
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_card_has_the_recipe_the_data_the_versions_and_the_figures(trained):
    metadata, text = parsed((trained.output / "README.md").read_text())
    # The base is a directory of this machine, which no hub could link to.
    assert metadata == {"library_name": "peft", "tags": ["lora", "qlora"]}
    facts = json.loads((trained.output / export.RUN_FILE).read_text())
    assert f"| data sha256 | `{facts['data_sha256']}` |" in text
    assert f"| measured.eval loss | {facts['measured']['eval_loss']:.4g} |" in text
    assert f"| versions.peft | `{facts['versions']['peft']}` |" in text
    recipe = re.search("```yaml\n(.*?)```", text, re.DOTALL).group(1)
    assert recipe == (trained.output / "recipe.yaml").read_text()


@pytest.fixture
def written(checkpoint, recipe, tmp_path):
    """written(base, revision) -> a directory with a fresh adapter that names them."""

    def write(base, revision, method="lora"):
        config = recipe(tiny.chat_model(checkpoint), method)
        source = open_source(config.model)
        model = load_base(config, source, CPU).model
        model = attach(model, config.lora, seed=0) if method != "full" else model
        directory = tmp_path / "my-adapter"
        export.write(directory, model, source.tokenizer(), "method: lora\n", base, revision, {"measured": {"step": 3}})
        return directory

    return write


def test_the_adapter_names_its_base_and_revision(written):
    directory = written("someone/some-model", "0a1b2c")
    config = json.loads((directory / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/some-model", "0a1b2c")
    assert export.base_of(directory) == ("someone/some-model", "0a1b2c")
    metadata, text = parsed((directory / "README.md").read_text())
    assert metadata == {"library_name": "peft", "base_model": "someone/some-model", "tags": ["lora", "qlora"]}
    assert text.startswith("# my-adapter\n\nA LoRA adapter for `someone/some-model` at `0a1b2c`.\n")


def test_a_whole_model_is_not_said_to_be_an_adapter(written):
    directory = written("someone/some-model", None, method="full")
    metadata, text = parsed((directory / "README.md").read_text())
    assert metadata == {"library_name": "transformers", "base_model": "someone/some-model", "tags": ["qlora"]}
    assert "LoRA" not in text and "Every weight trained, starting from `someone/some-model`.\n" in text


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_was_written_can_be_taken_away_and_nothing_else_is(method, written):
    directory = written("someone/some-model", None, method)
    (directory / "notes.txt").write_text("mine")
    assert export.is_there(directory)
    export.remove(directory)
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]
    (directory / "config.json").write_text("{}")  # somebody else's model
    export.remove(directory)
    assert (directory / "config.json").is_file()


def test_a_directory_that_is_no_adapter_is_said(tmp_path):
    with pytest.raises(AdapterError, match="no adapter there"):
        export.base_of(tmp_path)
    for content in ("{", "[]", "{}"):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(AdapterError, match=r"adapter_config\.json: names no base model"):
            export.base_of(tmp_path)
