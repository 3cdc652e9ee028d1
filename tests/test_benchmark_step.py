"""The benchmark against the stock stack runs, compares like with like, and writes down what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def benchmark(directory: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/step.py", "--model", str(directory), "--out", str(out), *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)}  # as pytest's own `pythonpath`: it need not be installed
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_both_sides_take_the_same_steps_and_every_figure_is_written_down(checkpoint, tmp_path):
    out = tmp_path / "results" / "step.json"
    done = benchmark(checkpoint("llama"), out, "--work", "2x12", "--steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())

    assert {"date", "command", "commit", "dirty", "versions", "hardware", "settings", "device"} <= set(written)
    assert [(work["k"], work["tokens"]) for work in written["works"]] == [(2, 12)]
    for work in written["works"]:
        assert work["losses_agree"]
        assert set(work["sides"]) == {"ours", "stock"}
        ours, stock = work["sides"]["ours"], work["sides"]["stock"]
        assert ours["trained"] == stock["trained"] > 0
        # Not only the first loss: the adapter starts from the same weights, and the optimizer moves it alike. bf16
        # rounds in other places, and Adam's first steps are of full length however small a gradient is.
        assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-2)
        assert ours["losses"][-1] < ours["losses"][0]
        for side in (ours, stock):
            assert len(side["seconds"]) == 2 and len(side["losses"]) == 4
            speed = side["tokens_per_second"]
            assert 0 < speed["p20"] <= speed["median"] <= speed["p80"]
            assert 0 < side["loaded_gib"] <= side["load_peak_gib"]
            assert side["step_peak_gib"] > 0
        pairs = [b / a for a, b in zip(ours["seconds"], stock["seconds"], strict=True)]
        assert min(pairs) <= work["ratio"]["p20"] <= work["ratio"]["median"] <= work["ratio"]["p80"] <= max(pairs)


@pytest.mark.slow
def test_a_side_that_fails_says_why(tmp_path):
    done = benchmark(tmp_path, tmp_path / "step.json", "--work", "1x8")
    assert done.returncode != 0
    assert "no .safetensors file" in done.stderr
    assert not (tmp_path / "step.json").exists()


def test_work_that_is_not_k_x_tokens_is_refused(tmp_path):
    done = benchmark(tmp_path, tmp_path / "step.json", "--work", "8by128")
    assert done.returncode == 2
    assert "8x128,4x512" in done.stderr
