"""`qlora runs`: what became of each run is told from its directory, for every way in which a run can end."""

import json
import os
import subprocess
import sys
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from qlora.cli import main
from qlora.errors import QLoRAError
from qlora.lock import Lock
from qlora.report import runs
from qlora.report.events import EventLog, Events
from qlora.report.runs import find_runs, read_run


def start(first_step=0, steps=10):
    return ("start", {"steps": steps, "first_step": first_step})


def step(number, loss=2.5):
    return ("step", {"step": number, "loss": loss, "tokens_per_second": 100.0 * number})


def end(number, stopped=None):
    return ("end", {"step": number, "tokens_per_second": 777.0, "stopped": stopped})


@pytest.fixture
def written(tmp_path):
    """written(name, *events) -> the directory of a run with that log, at tmp_path/outputs/name."""

    def write(name, *events):
        directory = tmp_path / "outputs" / name
        with Events([EventLog(directory / "events.jsonl")]) as log:
            for kind, fields in events:
                log.emit(kind, **fields)
        return directory

    return write


def checkpoint(directory, number, whole=True):
    made = directory / f"checkpoint-{number}"
    made.mkdir()
    if whole:
        (made / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("events", "said", "taken"),
    [
        ([start(), step(1), step(2), end(2)], "finished", 2),
        ([start(), step(1), end(1, "interrupted")], "interrupted at step 1", 1),
        ([start(), step(1), step(2), end(2, "NonFiniteLossError")], "failed at step 2: NonFiniteLossError", 2),
        ([start(), step(1), step(2), step(3)], "died at step 3", 3),
        ([start(), step(1), step(2), end(2, "interrupted"), start(2)], "died at step 2", 2),
        ([start(), *map(step, range(1, 8)), start(4), step(5)], "died at step 5", 5),
        ([start(), *map(step, range(1, 8)), start(4)], "died at step 4", 4),
        ([start(), *map(step, range(1, 8)), end(7), start()], "died at step 0", 0),
        ([start()], "died at step 0", 0),
        ([("plan", {"lines": []})], "died before its first step", 0),
        ([], "died before its first step", 0),
    ],
)
def test_the_state_of_a_run_is_what_its_last_attempt_came_to(events, said, taken, written):
    run = read_run(written("a", *events))
    assert (run.said, run.step) == (said, taken)
    assert run.state == said.split()[0]


def test_a_step_that_was_taken_back_is_not_the_last(written):
    run = read_run(
        written(
            "a",
            start(),
            ("evaluation", {"step": 0, "eval_loss": 9.0}),
            step(1, 5.0),
            step(2, 4.0),
            ("evaluation", {"step": 2, "eval_loss": 8.0}),
            step(3, 3.0),
            ("evaluation", {"step": 3, "eval_loss": 7.0}),
            start(2, steps=20),
        )
    )
    assert (run.step, run.steps, run.loss, run.eval_loss) == (2, 20, 4.0, 8.0)


def test_a_run_whose_lock_is_held_is_running_and_by_whom_is_said(written):
    directory = written("a", start(), step(1), end(1, "interrupted"))
    with Lock(directory):
        run = read_run(directory)
    assert run.said.startswith(f"running (process {os.getpid()} on ") and run.hint == ""
    assert read_run(directory).state == "interrupted"


def test_a_process_that_was_killed_is_not_running(written):
    directory = written("a", start(), step(1))
    program = (
        "import os, sys; from pathlib import Path; from qlora.lock import Lock\n"
        "Lock(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, directory]).returncode == -9
    assert read_run(directory).said == "died at step 1"


def test_the_hint_resumes_where_a_whole_checkpoint_is_and_starts_anew_where_none_is(written):
    directory = written("a run", start(), step(1))
    checkpoint(directory, 30, whole=False)
    assert read_run(directory).hint == "qlora train RECIPE"
    checkpoint(directory, 9)
    checkpoint(directory, 10)
    assert read_run(directory).hint == "qlora train RECIPE --resume"
    assert read_run(directory).checkpoint == "checkpoint-10"
    (directory / "recipe.yaml").touch()
    assert read_run(directory).hint == f"qlora train '{directory}/recipe.yaml' --resume"


def test_all_runs_below_are_found_once_and_a_broken_log_hides_no_other(written, tmp_path):
    written("b", start(), step(1), end(1))
    inner = written("a/deep/er", start(), step(1))
    (inner / "back").symlink_to(tmp_path / "outputs")
    for name, content in (
        ("c", b"\x80\n"),
        ("d", b'{"event": "start"}\n{"event": "step"}\n'),
        ("e", b'{"event": "end"}\n'),
    ):
        written(name)
        (tmp_path / "outputs" / name / "events.jsonl").write_bytes(content)
    (tmp_path / "outputs" / "f" / "events.jsonl").mkdir(parents=True)
    found = list(find_runs([tmp_path / "outputs", tmp_path / "outputs" / "b"]))
    assert [(os.path.relpath(run.directory, tmp_path / "outputs"), run.state) for run in found] == [
        ("a/deep/er", "died"),
        ("b", "finished"),
        *[(name, "unreadable") for name in "cde"],
    ]
    assert {run.said for run in found[2:]} == {"events.jsonl is damaged, or not a run's"}


def test_a_line_that_was_not_written_to_its_end_is_passed_over_however_long(written):
    directory = written("a", start(), step(1))
    with (directory / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "end", "text": "' + b"x" * 3_000_000)
    assert read_run(directory).said == "died at step 1"


def test_lines_are_whole_wherever_the_blocks_that_are_read_end(written, monkeypatch):
    directory = written("a", start(), *(step(number, number / 7) for number in range(1, 30)), end(29, "interrupted"))
    whole = read_run(directory)
    for size in (1, 2, 3, 7, 64, 99, 100, 101, 5000):
        monkeypatch.setattr(runs, "_BLOCK", size)
        assert read_run(directory) == whole
    assert whole.loss == 29 / 7 and whole.steps == 10


def test_a_log_of_100_mb_is_listed_at_once_and_without_torch(written, tmp_path):
    directory = written("a", start(steps=600_000))
    line = (
        b'{"event": "step", "time": 1.0, "step": %d, "loss": 1.25, "tokens_per_second": 5.0, "text": "'
        + b"x" * 80
        + b'"}\n'
    )
    with (directory / "events.jsonl").open("ab") as file:
        file.writelines(line % number for number in range(1, 600_001))
    assert (directory / "events.jsonl").stat().st_size > 100e6
    program = (
        "import sys, time; from qlora.cli import main; main(['runs', sys.argv[1], '--json'])\n"
        "print('torch' in sys.modules, time.process_time(), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        ran = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
        torch, took = ran.stderr.split()
        seconds.append(float(took))  # of this process alone: others work here too
    [run] = json.loads(ran.stdout)
    assert (run["said"], run["steps"], run["loss"]) == ("died at step 600,000", 600_000, 1.25)
    assert torch == "False"
    assert min(seconds) < 0.5
    tracemalloc.start()
    try:
        read_run(directory)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda s: st.lists(s, max_size=3)
)
NAMES = st.sampled_from(["step", "steps", "first_step", "loss", "eval_loss", "tokens_per_second", "stopped"])
KINDS = st.sampled_from(["start", "step", "evaluation", "end", "notice"])


@pytest.mark.torture
@given(
    st.lists(st.tuples(KINDS, st.dictionaries(NAMES, st.integers(0, 9) | ANYTHING)), max_size=6),
    st.none() | st.tuples(st.integers(0), st.binary(max_size=4)),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_is_in_a_log_the_run_is_listed(tmp_path, capsys, events, damage):
    told = b"".join(json.dumps({"event": kind, **fields}).encode() + b"\n" for kind, fields in events)
    if damage is not None:
        at = damage[0] % (len(told) + 1)
        told = told[:at] + damage[1] + told[at + len(damage[1]) :]
    (tmp_path / "events.jsonl").write_bytes(told)
    runs.show_runs([str(tmp_path)])  # what the command does, without making its parser 20,000 times
    assert str(tmp_path) in capsys.readouterr().out.splitlines()[0]
    runs.show_runs([str(tmp_path)], as_json=True)
    assert len(json.loads(capsys.readouterr().out)) == 1


# --- the command


def test_the_list_says_how_far_each_came_and_how_to_go_on(written, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = written(
        "a", start(), step(4, 1.23456), ("evaluation", {"step": 4, "eval_loss": 2.0}), end(4, "interrupted")
    )
    checkpoint(directory, 4)
    os.utime(directory / "events.jsonl", times=(time.time() - 7300,) * 2)
    written("b", start(), step(10, float("nan")), end(10))
    assert main(["runs"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "outputs/a",
        "  interrupted at step 4, 4 of 10 steps, loss 1.2346, held out 2.0000, 777 tokens/s, checkpoint-4, 2 hours ago",
        "  qlora train RECIPE --resume",
        "",
        "outputs/b",
        "  finished, 10 of 10 steps, loss nan, 777 tokens/s, just now",
        "  qlora generate outputs/b PROMPT",
    ]
    assert main(["runs", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["state"] == "interrupted" and first["checkpoint"] == "checkpoint-4" and first["eval_loss"] == 2.0
    assert second["loss"] == "nan"


def test_a_run_that_took_more_steps_than_it_was_to_take_in_the_end_says_how_many(written, tmp_path, capsys):
    written("a", start(), *map(step, range(1, 5)), end(4), start(4, steps=2), end(4))
    assert main(["runs", str(tmp_path)]) == 0
    assert "  finished, 4 steps, " in capsys.readouterr().out


def test_a_narrow_terminal_is_not_wrecked_and_nothing_steers_it(written, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written("long" * 40 + "\x1b[2J", start(), step(1), end(1, "Bad\x1b]0;title\x07Error"))
    monkeypatch.setattr(runs, "Console", lambda **_: Console(width=60, force_terminal=True, color_system=None))
    assert main(["runs"]) == 0
    told = capsys.readouterr().out
    assert "\x1b[2J" not in told and "\x1b]0;" not in told and "\\x1b[2J" in told
    facts = [line for line in told.splitlines()[1:] if "long" not in line]
    assert len(facts) >= 2 and all(line.startswith("  ") for line in facts)


def test_no_runs_are_no_error_and_a_directory_that_is_not_there_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs in outputs\n"
    (tmp_path / "empty").mkdir()
    assert main(["runs", "empty", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"
    assert main(["runs", "nowhere"]) == 1
    assert capsys.readouterr().err == "QLoRAError: nowhere: no such directory\n"
    with pytest.raises(QLoRAError, match="is not a directory"):
        list(find_runs([__file__]))
