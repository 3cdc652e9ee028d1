"""Combined, from the files to the report: what everyone answers is measured, what is written is whole or not there."""

import json
import shutil

import pytest
import torch
import yaml

from qlora import combining, run
from qlora.combining import combine, interference
from qlora.errors import AdapterError, MachineError
from qlora.library.facts import read_facts
from qlora.library.registry import Registry
from qlora.live import Live
from tests import tiny
from tests.serve.conftest import SAID, adapters  # noqa: F401 - the fixture


@pytest.fixture
def tasks(adapters, tmp_path):  # noqa: F811
    """The two adapters, with the rows that they learned as held-out rows: name -> directory."""
    for name, path in adapters.items():
        there = shutil.copytree(path, tmp_path / name)
        rows = tiny.write_rows(tmp_path / f"{name}.jsonl", list(SAID[name].items()))
        recipe = yaml.safe_load((there / "recipe.yaml").read_text())
        recipe["data"]["eval_datasets"] = [{"path": str(rows)}]
        recipe["training"] |= {"predict_with_generate": True, "generation_max_length": 20}
        (there / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return {name: tmp_path / name for name in adapters}


def words(tasks, *weights):
    return [f"{path}:{weight}" for path, weight in zip(tasks.values(), weights, strict=True)]


def test_each_task_is_measured_with_base_own_other_and_combination(tasks, tmp_path):
    said = []
    report = combine(words(tasks, 1, 1e-6), tmp_path / "both", say=said.append)
    assert "support on support: exact match 100.0%, loss" in "\n".join(said)
    assert report.who() == ["base", "support", "legal", "combined"]
    found = {
        task: {who: score.exact_match or 0.0 for who, score in each.items()} for task, each in report.scores.items()
    }
    assert found["support"]["support"] == found["legal"]["legal"] == 1
    assert found["support"]["legal"] < 1 and found["legal"]["support"] < 1 and found["support"]["base"] < 1
    assert found["support"]["combined"] == 1 and found["legal"]["combined"] < 1  # all but nothing of it went in
    assert [line.split()[0] for line in report.warnings()] == ["legal", "legal:"]
    for name in ("interference.json", "interference.md", "interference.svg"):
        assert (tmp_path / "both" / name).stat().st_size
    scores = json.loads((tmp_path / "both" / "interference.json").read_text())["scores"]
    assert scores["legal"]["combined"]["exact_match"] == found["legal"]["combined"]


def test_the_loss_is_transformers_own_over_the_same_tokens(tasks, tmp_path):
    report = interference([str(path) for path in tasks.values()])
    assert list(report.scores["support"]) == ["base", "support", "legal"] and not report.warnings()
    with Live.load(tasks) as live:
        live.use("legal")
        data = combining._rows(tasks["support"], False)
        batches = [data.held_out_batches(False)[i] for i in range(len(data.held_out_batches(False)))]
        total = tokens = 0.0
        for batch in batches:
            with torch.no_grad():
                logits = live._base.model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
            ).item()
            tokens += batch.supervised
    assert report.scores["support"]["legal"].loss == pytest.approx(total / tokens, rel=1e-4)


def test_what_comes_of_it_is_an_adapter_with_its_lineage(tasks, tmp_path):
    combine(words(tasks, 0.6, 0.4), tmp_path / "both", method="svd", evaluate=False)
    facts = json.loads((tmp_path / "both" / "run.json").read_text())
    assert [(each["name"], each["weight"]) for each in facts["combined_from"]] == [("support", 0.6), ("legal", 0.4)]
    own = json.loads((tasks["legal"] / "run.json").read_text())["files"]["adapter_model.safetensors"]["sha256"]
    assert facts["combined_from"][1]["sha256"] == own and facts["combined_by"] == {"method": "svd", "rank": 16}
    assert facts["base"]["fingerprint"] == read_facts(tasks["support"]).base_fingerprint and facts["versions"]["peft"]
    library = Registry(tmp_path / "home")
    version = library.add(tmp_path / "both")  # its files are what its run.json says
    assert not [each for each in library.verify() if each.bad] and library.facts(version).r == 16
    assert run.generate(tmp_path / "both", "Who?", max_new_tokens=4)
    assert "x 0.4" in (tmp_path / "both" / "interference.md").read_text()


@pytest.mark.parametrize("breaks", ["draw", "export.card", "Live.load"])
def test_nothing_is_left_where_it_was_not_finished(breaks, tasks, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"qlora.combining.{breaks}", full)
    with pytest.raises(
        MachineError, match=r"both: cannot be written: .*\n  give --out a directory on a disk with more"
    ):
        combine(words(tasks, 1, 1), tmp_path / "both")
    assert not list(tmp_path.glob("*both*"))


def test_what_is_there_already_is_not_touched(tasks, tmp_path):
    before = (tasks["legal"] / "adapter_model.safetensors").stat().st_mtime_ns
    with pytest.raises(AdapterError, match="legal: is there already; nothing is overwritten"):
        combine(words(tasks, 1, 1), tasks["legal"])
    with pytest.raises(AdapterError, match="is there already"):
        interference(words(tasks, 1, 1), tasks["legal"])
    assert (tasks["legal"] / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_task_whose_rows_are_gone_is_not_measured_and_that_is_said(tasks, tmp_path):
    (tmp_path / "legal.jsonl").unlink()
    report = interference(words(tasks, 1, 1), tmp_path / "report")
    assert list(report.scores) == ["support"]
    assert any(note.startswith("legal is not measured:") and "legal.jsonl" in note for note in report.notes)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        *("interference.json", "interference.md", "interference.svg", "manifest.json")
    }
    (tasks["support"] / "recipe.yaml").unlink()
    (tasks["legal"] / "recipe.yaml").unlink()
    report = interference(words(tasks, 1, 1))
    assert not report.scores and all("it has no recipe" in note for note in report.notes)
