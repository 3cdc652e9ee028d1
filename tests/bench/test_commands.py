"""`qlora bench` from the command line."""

import json

import pytest

from qlora.cli import main
from tests.bench.factory import cpu


def test_a_suite_for_gpus_exits_with_0_and_an_empty_table(tmp_path, capsys):
    assert main(["bench", "memory", "--out", str(tmp_path / "out.json")]) == 0
    said = capsys.readouterr().out
    assert "needs a GPU" in said
    assert not (tmp_path / "out.json").exists()


def test_report_writes_tables_and_a_page(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    cpu().write(tmp_path / "mine.json")
    assert main(["bench", "report", str(tmp_path / "mine.json")]) == 0
    assert "| qlora " in (tmp_path / "mine.md").read_text()
    assert "<svg" in (tmp_path / "mine.html").read_text()


def test_compare_exits_with_1_where_the_newer_is_slower(tmp_path, capsys):
    old = cpu()
    slow = old.model_copy(deep=True)
    for row in slow.rows:
        row.steps = [step.model_copy(update={"seconds": 3 * step.seconds}) for step in row.steps]
    old.write(tmp_path / "old.json")
    slow.write(tmp_path / "new.json")
    files = [str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert main(["bench", "compare", *files]) == 1
    assert main(["bench", "compare", *files[::-1]]) == 0
    assert main(["bench", "compare", *files, "--threshold", "lots"]) == 1
    assert "`lots`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "nothing"], "no such suite"),
        (["bench", "cpu", "--work", "many"], "`many` is not MICRO_BATCHES"),
        (["bench", "cpu", "--methods", "axolotl"], "methods"),
        (["bench", "cpu", "--vram", "lots"], "`lots` is not a number"),
        (["bench", "report", "nowhere.json"], "nowhere.json: cannot be read"),
    ],
)
def test_bad_input_is_a_line_and_not_a_traceback(words, said, capsys):
    assert main(words) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_the_schema_names_every_figure(capsys):
    assert main(["bench", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"StepTaken", "Peaks", "Row", "Agreement"} <= schema["$defs"].keys()
