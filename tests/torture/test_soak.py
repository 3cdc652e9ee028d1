"""A long run takes no more memory and no more open files at its end than at its beginning."""

import json
import os
from pathlib import Path

import psutil
import pytest

from tests.tiny import PAIRS, chat_model, recipe_text
from tests.torture.attempts import Attempt


class Sampler:
    """A sink that writes what its process holds, at some steps."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = str(path), every

    def __call__(self, event) -> None:
        if event["event"] == "step" and event["step"] % self.every == 0:
            process = psutil.Process()
            held = {"step": event["step"], "rss": process.memory_info().rss, "files": len(os.listdir("/proc/self/fd"))}
            with open(self.path, "a") as f:
                f.write(json.dumps(held) + "\n")


@pytest.mark.torture
@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_memory_and_open_files_do_not_grow_over_a_long_run(tmp_path, checkpoint, times):
    steps = times(300, 2000)
    training = {
        "max_steps": steps,
        "save_steps": steps // 20,
        "gradient_accumulation_steps": 1,
        "eval_steps": steps // 10,
    }
    text = recipe_text(
        chat_model(checkpoint), tmp_path, "qlora", PAIRS * 3, training=training, data={"eval_fraction": 0.2}
    )
    (tmp_path / "recipe.yaml").write_text(text)
    assert Attempt(tmp_path / "recipe.yaml", sink=Sampler(tmp_path / "held.jsonl", steps // 20)).wait() == 0
    held = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    # The first tenth fills caches: of compiled expressions, of the allocator, of what was imported late.
    first, last = held[1], held[-1]
    growth = last["rss"] / first["rss"] - 1
    print(f"{steps} steps: RSS {first['rss'] / 2**20:.1f} -> {last['rss'] / 2**20:.1f} MiB ({growth:+.2%})")
    assert last["step"] == steps and growth < 0.01
    assert last["files"] <= first["files"]
