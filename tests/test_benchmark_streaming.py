"""The benchmark of the memory tiers: its tiers do the same work, and what it writes down is what a reader needs."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora.config import Config
from qlora.errors import ModelError
from qlora.model.load import load_base
from tests.conftest import SMALL

ROOT = Path(__file__).parent.parent
TIERS = ("resident", "host", "file")
WORKS = [(1, 16), (3, 16)]
WARM_UP, STEPS = 1, 2
LAYERS = SMALL["num_hidden_layers"]


@pytest.fixture(scope="module")
def streaming():
    """benchmarks/streaming.py as it is when it is run: its neighbours beside it on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("streaming")


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "tiny.1b.json"
    path.write_text(json.dumps(SMALL | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return path


class Script:
    """A worker's end of the pipe: gives it steps to take, keeps what it says."""

    def __init__(self, works):
        self.works, self.said = [*works, None], []

    def recv(self):
        return self.works.pop(0)

    def send(self, report):
        self.said.append(report)


@pytest.fixture(scope="module")
def cases(streaming, shape, tmp_path_factory):
    """Every tier's worker from load to last step, its reports made into figures."""
    directory = tmp_path_factory.mktemp("caches")
    cases = []
    for tier in TIERS:
        case = {"shape": str(shape), "tier": tier, "cap_gib": None, "memory": {}, "device": "cpu"}
        case["directory"] = str(directory)
        script = Script([work for work in WORKS for _ in range(WARM_UP + STEPS)])
        streaming.serve(script, case)
        case["loaded"], *reports = script.said
        each = WARM_UP + STEPS
        case["works"] = [
            streaming.figures(*work, reports[n * each : (n + 1) * each], WARM_UP) for n, work in enumerate(WORKS)
        ]
        cases.append(case)
    streaming.against_resident(cases)
    return cases


def test_the_tiers_compute_the_same_bits(streaming, cases):
    losses = [[loss for work in case["works"] for loss in work["losses"]] for case in cases]
    assert losses[0] == losses[1] == losses[2]
    assert len(set(losses[0])) > 1  # they train
    (check,) = streaming.compare_losses(cases)
    assert check["equal"] and check["compared"] == len(WORKS) * (WARM_UP + STEPS)
    cases[1]["works"][1]["losses"][-1] += 1e-9
    assert not streaming.compare_losses(cases)[0]["equal"]
    cases[1]["works"][1]["losses"][-1] = losses[0][-1]


def test_each_tier_has_its_layers_where_it_says(cases):
    for case, place in zip(cases, ("device", "host", "file"), strict=True):
        assert case["loaded"]["tiers"][place] == case["loaded"]["layers"] == LAYERS
        assert (case["loaded"]["alone_gib_per_second"] is None) == (place == "device")
        assert (case["loaded"]["direct_reads"] is not None) == (place == "file")


def test_a_step_fetches_each_layer_twice_whatever_the_number_of_micro_batches(cases):
    for case in cases:
        for work in case["works"]:
            # The last layer goes from its forward into its backward, and layer 0 is still there at the next step.
            fetches = 0 if case["tier"] == "resident" else 2 * LAYERS - 2
            assert work["fetches_per_step"] == fetches
            assert work["fetched_gib_per_step"] * 1024 == pytest.approx(fetches * case["loaded"]["layer_mib"])


def test_stalls_are_part_of_the_step_and_contain_what_the_host_waited(cases):
    for case in cases:
        for work in case["works"]:
            assert 0 <= work["waited_share"]["median"] <= work["stalled_share"]["median"] < 1
    assert all(work["waited_share"]["median"] > 0 for work in cases[2]["works"])


def test_speed_is_tokens_over_seconds_and_compared_step_by_step(cases):
    for case in cases:
        for work, there in zip(case["works"], cases[0]["works"], strict=True):
            assert len(work["seconds"]) == STEPS
            speeds = sorted(work["tokens_per_step"] / seconds for seconds in work["seconds"])
            assert speeds[0] <= work["tokens_per_second"]["p20"] <= work["tokens_per_second"]["p80"] <= speeds[-1]
            ratios = [a / b for a, b in zip(there["seconds"], work["seconds"], strict=True)]
            assert min(ratios) <= work["of_resident"]["median"] <= max(ratios)
            assert work["peak_gib"] > 0


def test_a_random_base_is_the_same_each_time_and_is_known_to_the_cache_by_shape_and_seed(streaming, shape, tmp_path):
    from random_base import random_source  # beside streaming

    def load(seed):
        told = []
        source = random_source(str(shape), tmp_path, torch.device("cpu"), seed)
        config = Config.model_validate(
            {
                "model": {"model_name_or_path": str(shape)},
                "data": {"datasets": [{"path": "unused"}]},
                "memory": {"nf4_cache_dir": str(tmp_path)},
            }
        )
        base = load_base(config, source, torch.device("cpu"), told.append)
        assert not told
        layer: torch.Tensor = base.model.model.layers[1].mlp.up_proj.weight
        return base, layer

    (first, weight), (again, same), (other, different) = load(0), load(0), load(1)
    assert (first.cached, again.cached, other.cached) == (False, True, False)
    assert torch.equal(weight, same) and not torch.equal(weight, different)
    assert not torch.equal(weight, first.model.model.layers[0].mlp.up_proj.weight)
    assert weight.float().std().item() == pytest.approx(0.02, rel=0.05)  # 8192 draws: 0.8% of standard error
    assert torch.equal(first.model.model.norm.weight, torch.ones_like(first.model.model.norm.weight))


@pytest.mark.parametrize(("cause", "expected"), [(torch.OutOfMemoryError("24 GiB"), True), (ValueError("?"), False)])
def test_a_process_tells_memory_that_ran_out_from_other_failures(streaming, monkeypatch, cause, expected):
    def load(pipe, case):
        raise ModelError("its weights do not fit") from cause  # as the loader tells it

    monkeypatch.setattr(streaming, "serve", load)
    script = Script([])
    streaming.case_process(script, {})
    assert script.said[0]["error"] == "ModelError: its weights do not fit"
    assert script.said[0]["out_of_memory"] is expected


class Roomy:
    """Stands for a process on a device with room for so many tokens; without it, it would need a device."""

    room, started = 0, 0

    def __init__(self, case, limit_s):
        type(self).started += 1
        self.failure = None

    def report(self, work=None):
        assert self.failure is None, "a process that ran out of memory was asked again"
        if work and work[1] > self.room:
            self.failure = {"error": "OutOfMemoryError", "out_of_memory": True}
            return None
        return {"seconds": 1.0}

    def close(self):
        pass


@pytest.mark.parametrize("room", [9_000, 37_000, 131_072, 900_000])
def test_the_longest_context_is_found_to_an_eighth(streaming, monkeypatch, room):
    monkeypatch.setattr(streaming, "Side", Roomy)
    monkeypatch.setattr(Roomy, "room", room)
    case = {"shape": "x", "tier": "resident", "cap_gib": 24, "memory": {}, "device": "cuda"}
    streaming.longest(case, 8192, 2**18, 60, lambda case: None, lambda text: None)
    found, most = case["longest"]["tokens"], min(room, 2**18)
    assert most * 8 / 9 - 1024 <= found <= most
    assert not case["ended_early"] and "failure" not in case


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/streaming.py", "--out", str(out), *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_tiers_take_turns_and_every_figure_is_written_down(shape, tmp_path):
    out = tmp_path / "results" / "streaming.json"
    options = ["--shape", str(shape), "--work", "1x16,2x16", "--steps", "2", "--cache-dir", str(tmp_path / "cache")]
    done = run(out, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())
    assert {"date", "command", "commit", "dirty", "versions", "hardware", "settings"} <= set(written)
    assert [case["tier"] for case in written["cases"]] == list(TIERS)
    assert written["losses"][0]["equal"]
    for case in written["cases"]:
        assert {"device_name", "parameters", "layer_mib", "load_peak_gib"} <= set(case["loaded"])
        assert [work["k"] for work in case["works"]] == [1, 2]
        for work in case["works"]:
            assert {"tokens_per_second", "of_resident", "stalled_share", "fetches_per_step", "peak_gib"} <= set(work)
    turns = [line.split()[1] for line in done.stdout.splitlines() if "step 1/2" in line]
    assert turns == [*TIERS, *TIERS]


@pytest.mark.slow
def test_a_case_that_is_late_or_fails_leaves_a_line(shape, tmp_path):
    out = tmp_path / "streaming.json"
    done = run(out, "--shape", str(shape), "--tiers", "resident", "--work", "1x16", "--limit-s", "0.01")
    assert done.returncode == 1  # nothing was measured
    assert "was not done within" in json.loads(out.read_text())["cases"][0]["failure"]["error"]
    done = run(out, "--shape", str(shape), "--tiers", "host", "--work", "1x16", "--memory", "activations=nowhere")
    assert done.returncode == 1
    assert "memory.activations" in done.stdout


def test_what_cannot_be_measured_is_refused(tmp_path):
    assert "--cap-gib" in run(tmp_path / "o.json", "--cap-gib", "8").stderr
    assert "no such tier: vram" in run(tmp_path / "o.json", "--tiers", "vram").stderr
