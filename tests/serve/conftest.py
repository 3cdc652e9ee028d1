"""Two adapters on one tiny base that learned to answer the same questions differently, and the base with both on it."""

from pathlib import Path

import pytest

from qlora import run
from qlora.live import Live
from tests import tiny

SAID = {
    "support": {"Who?": "Ada", "The cat?": "The cat sat on the mat.", "Where do you live?": "In Oslo."},
    "legal": {"Who?": "The question is well.", "The cat?": "Ada", "Where do you live?": "I am a mat."},
}


@pytest.fixture(scope="session")
def adapters(checkpoint, tmp_path_factory) -> dict[str, Path]:
    """Name -> the directory of an adapter that gives the answers of SAID."""
    model = tiny.chat_model(checkpoint)
    found = {}
    for name, said in SAID.items():
        directory = tmp_path_factory.mktemp(name)
        config = tiny.recipe(
            model,
            directory,
            "qlora",
            list(said.items()),
            data={"packing": False},
            lora={"r": 16, "lora_alpha": 32},
            training={
                "max_steps": 60,
                "learning_rate": 2e-2,
                "gradient_accumulation_steps": 1,
                "per_device_train_batch_size": 3,
            },
        )
        run.train(config, sinks=[])
        found[name] = directory / "out"
    return found


@pytest.fixture(scope="module")
def live(adapters):
    with Live.load(adapters) as live:
        yield live
