"""A run that is killed at any moment goes on as if it had never been, to the same bits."""

import hashlib
import random
import time

import pytest

from qlora import durable
from qlora.train.checkpoint import checkpoints
from tests.tiny import chat_model, recipe_text
from tests.torture.attempts import Attempt, told

STEPS = 12
SAME = ("epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised")


@pytest.fixture(scope="module")
def prepare(checkpoint):
    """prepare(directory) -> the recipe of a run with 4-bit layers, 8-bit optimizer states and dropout."""
    model = chat_model(checkpoint)

    def make(directory):
        directory.mkdir()
        training = {"optim": "adamw_8bit", "max_steps": STEPS, "save_steps": 1, "gradient_accumulation_steps": 1}
        text = recipe_text(model, directory, "qlora", training=training, lora={"lora_dropout": 0.1})
        (directory / "recipe.yaml").write_text(text)
        return directory / "recipe.yaml", directory / "out"

    return make


def adapter_hash(output):
    return hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.torture
@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_is_the_run_that_was_never_stopped(tmp_path, prepare, times):
    recipe, output = prepare(tmp_path / "uninterrupted")
    assert Attempt(recipe).wait() == 0  # quantizes, so that those after it load from the cache
    expected, sha256 = told(output, *SAME), adapter_hash(output)
    assert len(expected) == STEPS

    drawn, wanted = random.Random(6), times(10, 60)
    killed = in_a_save = resumed = number = 0
    while killed < wanted:
        number += 1
        recipe, output = prepare(tmp_path / f"run{number}")
        for _ in range(drawn.choice((1, 1, 3))):  # some are killed again after they were resumed
            slow = drawn.choice((0.0, 0.03, 0.03))
            started = time.monotonic()
            attempt = Attempt(recipe, resume=bool(checkpoints(output)), slow_disk=slow)
            log = output / "events.jsonl"
            size = log.stat().st_size if log.exists() else 0
            while attempt.process.is_alive() and (not log.exists() or log.stat().st_size == size):
                time.sleep(0.002)  # loading is not what is tried here, or only now and then
                if drawn.random() < 0.0005:
                    break
            time.sleep(drawn.uniform(0, 2.5 if slow else 0.6))
            if attempt.kill():
                killed += 1
                in_a_save += any(path.name.startswith(".checkpoint-") for path in output.glob(durable.UNFINISHED))
            assert time.monotonic() - started < 120
        assert Attempt(recipe, resume=bool(checkpoints(output))).wait() == 0
        resumed += 1
        assert told(output, *SAME) == expected
        assert adapter_hash(output) == sha256
        assert [path.name for path in checkpoints(output)] == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]
        assert not list(output.glob(durable.UNFINISHED))
    print(f"{killed} kills, {in_a_save} of them inside a save; {resumed} of {number} runs went on to the same bits")
    assert in_a_save >= times(1, 15)
