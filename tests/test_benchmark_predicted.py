"""The benchmark of the plan: the CPU run agrees, the JSON is whole, and its verdict is the issue's."""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qlora.config import Config
from qlora.plan.types import Rates
from tests.conftest import SMALL

ROOT = Path(__file__).parent.parent
SHAPE = SMALL | {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def predicted():
    """benchmarks/predicted.py as it is when it is run: its neighbours beside it on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("predicted")


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "tiny.json"
    path.write_text(json.dumps(SHAPE))
    return str(path)


@pytest.fixture
def alone(predicted, monkeypatch):
    """All of it in this process, on a machine whose rates are known."""
    rates = Rates(flops=1e10, memory=1e10, launch=1e-5)

    def here(limit_s, function, *arguments):
        if function is predicted.rates_here:
            return {"device_name": "CPU", "card": None, "measured": rates, "data_sheet": None, "notes": []}
        return function(*arguments)

    class Now:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, *arguments):
            future = predicted.Future()
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
            return future

    monkeypatch.setattr(predicted, "apart", here)
    monkeypatch.setattr(predicted, "ProcessPoolExecutor", Now)


def test_the_command_writes_down_all_that_it_compares_and_the_memory_agrees(
    predicted, alone, shape, monkeypatch, tmp_path, capsys
):
    out = tmp_path / "results" / "predicted.json"
    options = ["--cases", "2-3,6", "--shape", shape, "--steps", "2", "--warm-up", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["predicted.py", *options, "--cache-dir", str(tmp_path / "cache")])
    status = predicted.main()
    shown = capsys.readouterr().out
    assert status == 0, shown
    written = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert {"date", "command", "versions", "hardware", "device", "summary", "machine", "cases"} <= set(written)
    assert written["machine"]["measured"]["flops"] == 1e10
    for entry in written["cases"]:
        foretold, measured = entry["predicted"], entry["measured"]
        assert sum(foretold["device"].values()) == foretold["allocated_bytes"]
        # Apart are the first token of each row, which nothing predicts, and the code books that real weights share.
        assert foretold["allocated_bytes"] == pytest.approx(measured["allocated_bytes"], rel=0.01)
        assert entry["errors"]["allocated"] == foretold["allocated_bytes"] / measured["allocated_bytes"] - 1
        assert len(measured["seconds"]) == 2 and len(measured["warm_up_seconds"]) == 1
        assert len(measured["losses"]) == 4  # one step to warm up, one to count, two to time
        assert len(set(measured["losses"][1:])) == 3  # it trains; the first step has a learning rate of 0
        assert measured["tokens_per_second"] == pytest.approx(foretold["tokens"] / measured["median_seconds"])
        time = foretold["time"]["measured"]
        assert time["tokens_per_second"] == pytest.approx(foretold["tokens"] / sum(time["by_phase"].values()))
    assert written["summary"]["pass"] and written["summary"]["figures"]["allocated"]["cases"] == 3
    on_host, _, packed = (entry["predicted"] for entry in written["cases"])
    assert on_host["device"]["base"] and packed["tokens"] == 2 * 4 * 128
    assert "allocated: off by" in shown and "pass" in shown and "base" in shown


def test_packed_documents_are_one_row_that_starts_anew_with_each(predicted):
    import torch

    case = predicted.Case("x", 3, 8, 2, packing=True)
    batches = predicted.batches_of(case, 100, torch.device("cpu"))
    assert [batch.documents for batch in batches] == [((8, 8, 8),)] * 2
    assert all(batch.supervised == 3 * 7 for batch in batches)
    assert predicted.batches_of(replace(case, packing=False), 100, torch.device("cpu"))[0].input_ids.shape == (3, 8)


def on_gpu(allocated, reserved, speed, n=12):
    """The usual errors, and one case that is further off."""
    names = ("allocated", "reserved", "tokens_per_second")
    usual = [{"measured": {}, "errors": dict.fromkeys(names, 0.001)} for _ in range(n - 1)]
    return [{"measured": {}, "errors": dict(zip(names, (allocated, reserved, speed), strict=True))}, *usual]


@pytest.mark.parametrize(
    ("entries", "passes"),
    [
        (on_gpu(0.029, -0.029, 0.149), True),
        (on_gpu(0.03, -0.03, -0.15), True),
        (on_gpu(0.031, 0.0, 0.0), False),
        (on_gpu(-0.031, 0.0, 0.0), False),  # too little is as wrong as too much
        (on_gpu(0.0, 0.031, 0.0), False),
        (on_gpu(0.0, 0.0, -0.151), False),
        (on_gpu(0.0, 0.0, 0.0, n=11), False),  # fewer than the issue asks for
        ([{"measured": {}, "errors": {"allocated": 0.0, "reserved": 0.0}}] * 12, False),  # no rates
        ([*on_gpu(0.0, 0.0, 0.0), {"skipped": "no time"}, {"failure": {"error": "?"}}], True),
        ([], False),
    ],
)
def test_it_passes_where_the_worst_of_twelve_cases_is_within_the_limits(predicted, entries, passes):
    found = predicted.summary(entries, "cuda")
    assert found["pass"] is passes
    assert predicted.verdicts(found)[-1].endswith("pass" if passes else "FAIL")


def test_the_summary_names_the_worst_case_and_the_median(predicted):
    entries = [{"measured": {}, "errors": {"allocated": e, "tokens_per_second": 9.0}} for e in (0.001, -0.02, 0.004)]
    found = predicted.summary([*entries, {"skipped": "no time"}], "cpu")
    allocated = found["figures"]["allocated"]
    assert (allocated["worst_case"], allocated["max"], allocated["median"]) == (2, 0.02, 0.004)
    assert allocated["within"] == 2 and not found["pass"]
    assert found["figures"]["tokens_per_second"]["pass"] is None  # not judged on a CPU
    assert (found["measured"], found["skipped"], found["failed"]) == (3, 1, 0)


def test_cases_for_which_no_time_is_left_are_skipped_and_said(predicted, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(predicted.time, "monotonic", lambda: now[0])
    cases = [predicted.Case("x", 1, n, 1) for n in range(1, 6)]
    entries, noted, limits = [{} for _ in cases], [], []

    def take_one(case, limit_s):
        limits.append(limit_s)
        now[0] += 40
        return {"allocated_bytes": 1}

    predicted.run_cases(cases, entries, take_one, 2.5, 1000.0 - 20, 90, lambda *seen: noted.append(seen))
    # 150 s, of which 20 are gone: three cases of 40 s, and a fourth would not end in time.
    assert ["measured" in entry for entry in entries] == [True, True, True, False, False]
    assert all("10 s of 2.5 minutes were left" in entry["skipped"] for entry in entries[3:])
    assert limits == [90, 90, 50]  # none outlasts the budget
    assert len(noted) == 5


def test_a_case_that_fails_is_recorded_and_the_others_go_on(predicted):
    cases, answers = [predicted.Case("x", 1, n, 1) for n in (1, 2)], [{"error": "Boom: x", "traceback": "..."}, {}]
    entries = [{}, {"failure": {"of": "prediction", "error": "Bang: y"}}]
    predicted.run_cases(cases, entries, lambda *_: answers.pop(0), None, 0.0, 60, lambda *_: None)
    assert entries[0] == {"failure": {"of": "measurement", "error": "Boom: x", "traceback": "..."}}
    assert "measured" in entries[1] and entries[1]["failure"]["of"] == "prediction"
    assert predicted.summary(entries, "cuda")["failed"] == 2


def test_a_process_answers_or_its_failure_is_told(predicted):
    assert predicted.apart(60, predicted.finite, {"x": [float("inf"), 1]}) == {"x": [None, 1]}
    assert predicted.apart(60, predicted.chosen, "one")["error"].startswith("ValueError")
    assert predicted.apart(60, os._exit, 3) == {"error": "its process ended with status 3"}
    late = predicted.apart(0.2, time.sleep, 60)
    assert late == {"error": "was not done within 0 s", "late": True}


def test_the_cases_are_as_many_and_as_different_as_the_issue_asks(predicted):
    shape_of = importlib.import_module("random_base").shape_of
    cases = predicted.CASES["cuda"]
    assert len(cases) >= 14 and predicted.LEAST["cuda"] == 12
    assert {case.shape for case in cases} == {"llama3.2-1b", "llama3.2-3b", "llama3.1-8b"}
    for case in (*cases, *predicted.CASES["cpu"]):
        assert isinstance(predicted.config_of(case, Path("d")), Config)  # the recipe takes it
        assert case.shape == "small" or shape_of(case.shape)["num_hidden_layers"]
    knobs = {key for case in cases for key in case.memory}
    assert knobs >= {"layers_on_device", "activations", "embeddings", "adapters", "loss_chunk_tokens"}
    assert knobs >= {"layer_tile_tokens", "layers_kept", "micro_batch_tokens", "layers_on_host"}


@pytest.mark.exhaustive
def test_the_command_runs_each_case_in_a_process_of_its_own(shape, tmp_path):
    out = tmp_path / "predicted.json"
    command = [sys.executable, "benchmarks/predicted.py", "--quick", "--shape", shape, "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())
    assert written["machine"]["measured"]["flops"] > 0
    assert written["summary"]["measured"] == 2 and written["summary"]["pass"]
