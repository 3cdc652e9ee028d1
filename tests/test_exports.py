"""`qlora export`: what cannot be exported is refused before anything is written; what is, is asked what was learned."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from qlora import durable, exports, run, verified
from qlora.errors import AdapterError, DataError, MachineError, ModelError
from qlora.export import llama_cpp
from qlora.export.llama_cpp import Agreement, Difference, find_spec
from tests import disk_faults, tiny
from tests.export.test_gguf import chat_tokenizer

PAIRS = [("Who?", "Ada"), ("The cat?", "The cat sat on the mat."), ("Where do you live?", "In Oslo.")]


@pytest.fixture(scope="session")
def trained(checkpoint, tmp_path_factory):
    """The directory of an adapter that gives the answers of PAIRS, which it was asked as held-out rows too."""
    tokenizer = chat_tokenizer()
    directory = tmp_path_factory.mktemp("trained")
    model = shutil.copytree(checkpoint("qwen2", vocab_size=448, max_position_embeddings=256), directory / "model")
    tokenizer.save_pretrained(model)
    rows = tiny.write_rows(directory / "held_out.jsonl", PAIRS)
    how = {"max_steps": 60, "learning_rate": 2e-2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 3}
    config = tiny.recipe(
        model,
        directory,
        "qlora",
        PAIRS,
        lora={"r": 16, "lora_alpha": 32},
        data={"packing": False, "eval_datasets": [{"path": str(rows)}]},
        training=how | {"generation_max_length": 24},
    )
    run.train(config, sinks=[])
    return directory / "out"


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copied")


def test_each_export_loaded_anew_answers_as_the_live_adapter_does(trained, tmp_path):
    said = []
    exports.export(trained, ["peft", "merged"], tmp_path / "out", verify=True, say=said.append)
    found = json.loads((tmp_path / "out" / verified.FILE).read_text())
    assert found["live"] == {"questions": 3, "exact": 3, "ended": 3}
    for kind in ("peft", "merged"):
        assert (found["exports"][kind]["exact"], found["exports"][kind]["problems"]) == (3, [])
        assert found["exports"][kind]["agreement"] == {
            "prompts": 3, "equal": 3, "rendered": 3, "ended": 3, "stopped": 3, "differences": []
        }  # fmt: skip
    assert all(len(line) <= 100 for line in said if "/3" in line)


@pytest.mark.skipif(not find_spec("xllamacpp"), reason="needs the extra `llama-cpp`")
def test_llama_cpp_answers_as_the_live_adapter_does_merged_and_beside_the_base_as_it_was_trained(trained, tmp_path):
    kinds, out = ["gguf", "gguf-lora", "ollama"], tmp_path / "out"
    exports.export(trained, kinds, out, weights="dequantized", verify=True, say=lambda text: None)
    found = json.loads((out / verified.FILE).read_text())["exports"]
    assert [(found[kind]["exact"], found[kind]["agreement"]["equal"]) for kind in kinds[:2]] == [(3, 3), (3, 3)]
    assert found["gguf-lora"]["loaded_by"] == "llama.cpp on base-f16.gguf"
    assert found["ollama"]["agreement"]["rendered"] == 3 and not found["ollama"]["problems"]


def test_an_export_that_is_not_the_adapter_is_an_error_with_its_figures(trained, tmp_path, monkeypatch):
    copy = exports.export_peft

    def spoiled(adapter, out, *how):
        copy(adapter, out, *how)
        weights = {name: torch.zeros_like(t) for name, t in load_file(out / "adapter_model.safetensors").items()}
        save_file(weights, out / "adapter_model.safetensors", {"format": "pt"})

    monkeypatch.setattr(exports, "export_peft", spoiled)
    with pytest.raises(AdapterError, match=r"(?s)not the adapter that was trained.*peft: 0 of 3 answers are right"):
        exports.export(trained, ["peft"], tmp_path / "out", verify=True, say=lambda text: None)
    assert json.loads((tmp_path / "out" / verified.FILE).read_text())["exports"]["peft"]["problems"]


@pytest.mark.parametrize(
    ("exact", "equal", "gaps", "rendered", "stopped", "problems"),
    [
        (80, 95, [0.0] * 5, 100, 100, []),
        (78, 95, [0.0] * 5, 100, 100, []),
        (77, 95, [0.0] * 5, 100, 100, ["77 of 100 answers are right, 80 of the live adapter's"]),
        (80, 85, [0.5] * 15, 100, 100, []),
        (80, 85, [0.6] * 15, 100, 100, ["15 of 100 answers differ where the live adapter was decided"]),
        (80, 85, [None] * 15, 100, 100, ["15 of 100 answers differ where the live adapter was decided"]),
        (80, 100, [], 99, 100, ["1 of 100 conversations become another prompt than in training"]),
        (80, 100, [], 100, 89, ["11 of 100 answers do not end by themselves"]),
    ],
)
def test_an_export_passes_within_its_limits_and_not_beyond(exact, equal, gaps, rendered, stopped, problems):
    differences = tuple(Difference(i, 0, 1, 2, gap) for i, gap in enumerate(gaps))
    agreement = Agreement(100, equal, rendered, 100, stopped, differences)
    assert verified.Verified("gguf", "llama.cpp", exact, True, agreement).problems(80) == problems


def test_what_the_libraries_tell_programmers_is_not_in_the_table(trained, tmp_path, recwarn, capsys, monkeypatch):
    class Talking(verified.PeftModel):
        @classmethod
        def from_pretrained(cls, *how, **more):
            list(tqdm(range(2), desc="Converting"))  # as transformers does with a .gguf file's tensors
            return super().from_pretrained(*how, **more)

    monkeypatch.setattr(verified, "PeftModel", Talking)
    exports.export(trained, ["peft"], tmp_path / "out", verify=True, say=lambda text: None)
    assert not [each for each in recwarn if "is_gradient_checkpointing" in str(each.message)]
    assert "Converting" not in capsys.readouterr().err


def test_a_modelfile_names_what_is_made_with_it_and_not_what_lies_there_from_before(trained, tmp_path):
    def made(*kinds):
        exports.export(trained, kinds, tmp_path, name="a", weights="dequantized", say=lambda text: None)
        lines = (tmp_path / "Modelfile").read_text().splitlines()
        return [line for line in lines if line.startswith(("FROM", "ADAPTER"))]

    assert made("gguf", "ollama") == ["FROM ./a-f16.gguf"]
    assert made("gguf-lora", "ollama") == ["FROM ./base-f16.gguf", "ADAPTER ./a-lora.gguf"]
    assert made("ollama") == ["FROM ./a-f16.gguf"]


def refused(adapter, out, error, match, kinds=("peft",), **how):
    with pytest.raises(error, match=match):
        exports.export(adapter, kinds, out, say=lambda text: None, **how)
    assert not out.exists()


def test_a_run_that_died_has_no_adapter(copied, tmp_path):
    (copied / "adapter_config.json").unlink()
    refused(copied, tmp_path / "out", AdapterError, "a run that died has none yet")


def test_a_whole_model_is_told_from_a_run_that_died(copied, tmp_path):
    (copied / "adapter_config.json").rename(copied / "config.json")
    refused(copied, tmp_path / "out", AdapterError, "every weight was trained: it is a whole model already")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_an_adapter_that_is_not_what_its_run_wrote_is_refused(file, copied, tmp_path):
    content = (copied / file).read_bytes()
    (copied / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(copied, tmp_path / "out", AdapterError, f"{file} is not what its run wrote")
    (copied / file).unlink()
    refused(copied, tmp_path / "out", AdapterError, f"{file}( is missing|)")


def test_an_adapter_from_elsewhere_has_no_rows_and_none_are_looked_for(copied, tmp_path, monkeypatch):
    for name in ("recipe.yaml", "run.json"):
        (copied / name).unlink()
    for name in ("prepare", "read_splits"):
        monkeypatch.setattr(exports, name, None)
    refused(copied, tmp_path / "out", AdapterError, "there are no held-out rows to measure", kinds=("merged",))
    refused(copied, tmp_path / "out", DataError, "has no recipe.yaml, whose held-out rows", verify=True)
    exports.export(copied, ["merged"], tmp_path / "out", force=True, say=lambda text: None)


def test_nothing_is_written_in_place_of_what_it_is_made_from(trained, tmp_path):
    exports.export(trained, ["gguf"], tmp_path, name="a", say=lambda text: None)
    base = tmp_path / "a-f16.gguf"
    before = base.read_bytes()
    with pytest.raises(AdapterError, match=r"a-f16\.gguf: is the base itself; give another place with --out"):
        exports.export(trained, ["gguf"], tmp_path, name="a", base=str(base), force=True, say=lambda text: None)
    assert base.read_bytes() == before
    shutil.copytree(trained, tmp_path / "peft")
    with pytest.raises(AdapterError, match="peft: is the adapter itself"):
        exports.export(tmp_path / "peft", ["peft"], tmp_path, say=lambda text: None)


def test_what_cannot_be_made_is_said_before_the_rest_is_written(trained, tmp_path):
    refused(trained, tmp_path / "out", AdapterError, "ollama: needs a model as .gguf", kinds=("peft", "ollama"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match="file: is a file; give a directory"):
        exports.export(trained, ["merged"], tmp_path / "file", say=lambda text: None)


def test_a_full_disk_names_the_place_that_was_given(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(durable.Writer, "write", lambda *_: disk_faults.full())
    with pytest.raises(MachineError, match=rf"^{tmp_path}/out/merged: .*No space left.*\n  give --out"):
        exports.export(trained, ["gguf"], tmp_path / "out", say=lambda text: None)
    assert not list((tmp_path / "out").iterdir())


def test_a_base_that_is_gone_is_named_with_what_to_do(copied, tmp_path):
    refused(
        copied, tmp_path / "out", ModelError, r"(?s)copied: its base cannot be opened.*--base", base=str(tmp_path / "x")
    )


def test_a_base_of_other_weights_is_refused(copied, checkpoint, tmp_path):
    run_json = json.loads((copied / "run.json").read_text())
    assert run_json["base"]["fingerprint"]
    run_json["base"]["fingerprint"] = "0" * 64
    (copied / "run.json").write_text(json.dumps(run_json))
    refused(copied, tmp_path / "out", AdapterError, "was trained on other weights")
    exports.export(copied, ["peft"], tmp_path / "out", force=True, say=lambda text: None)


def test_a_base_of_another_shape_is_refused_where_no_fingerprint_tells(copied, checkpoint, tmp_path):
    (copied / "run.json").unlink()
    base = str(tiny.chat_model(checkpoint, "qwen2", hidden_size=32))
    refused(copied, tmp_path / "out", AdapterError, "is for another base", base=base)


def test_verifying_needs_the_rows_that_were_held_out(copied, tmp_path):
    recipe = (copied / "recipe.yaml").read_text()
    (copied / "recipe.yaml").write_text(recipe.replace("held_out.jsonl", "gone.jsonl"))
    refused(copied, tmp_path / "out", DataError, "--verify asks the held-out rows of its recipe", verify=True)


def test_without_llama_cpp_nothing_is_written_that_it_was_to_verify(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda _: None)
    refused(trained, tmp_path / "out", MachineError, "llama-cpp", kinds=("gguf",), verify=True)


def test_an_adapter_for_llama_cpp_is_verified_on_a_gguf_of_its_base(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda _: True)
    refused(trained, tmp_path / "out", AdapterError, "--weights dequantized", kinds=("gguf-lora",), verify=True)


@pytest.mark.parametrize("adds", [True, False])
def test_a_bos_stands_in_the_template_only_where_the_gguf_does_not_bring_it(monkeypatch, tmp_path, adds):
    tokenizer = chat_tokenizer(bos="<|im_start|>")
    monkeypatch.setattr(exports, "check_gguf", lambda _: {"tokenizer.ggml.add_bos_token": adds})
    template, stops, bos = exports._template(tmp_path / "m.gguf", tokenizer)
    asked = [{"role": "user", "content": "Who?"}]
    assert template is not None and stops == ["<|im_end|>"] and bos == ("<|im_start|>" if adds else "")
    expected = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert bos + template.render(asked) == expected
