"""A whole run in little: a model with a chat tokenizer beside it, rows to learn, and a recipe over both."""

import json
from pathlib import Path

from qlora.config import Config
from qlora.recipe import parse_recipe
from tests.data.conftest import CHATML, build_tokenizer

PAIRS = [
    ("What is your name?", "My name is Ada."),
    ("Where do you live?", "In Oslo."),
    ("Hello, how are you?", "I am well, thank you. What is the question?"),
    ("add", "def add(a, b):\n    return a + b"),
    ("The cat?", "The cat sat on the mat."),
    ("Who?", "Ada"),
    ("City as JSON", '{"city": "Oslo"}'),
]


def chat_model(checkpoint, architecture: str = "llama", **changes) -> Path:
    """A tiny model that can chat. checkpoint: the fixture of tests/conftest.py."""
    tokenizer = build_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    path = checkpoint(architecture, vocab_size=len(tokenizer), max_position_embeddings=256, **changes)
    tokenizer.save_pretrained(path)
    return path


def write_rows(path: Path, pairs=PAIRS) -> Path:
    """Questions and answers as JSON lines."""
    path.write_text("".join(json.dumps({"prompt": asked, "completion": said}) + "\n" for asked, said in pairs))
    return path


def recipe_text(model: Path, directory: Path, method: str = "lora", pairs=PAIRS, **sections: dict) -> str:
    """A recipe whose rows and output lie in `directory`. JSON, which is YAML."""
    training = {"output_dir": str(directory / "out"), "per_device_train_batch_size": 2, "optim": "adamw_torch"}
    training |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    values = {
        "method": method,
        "model": {"model_name_or_path": str(model), "dtype": "float32"},
        "quantization": {"bnb_4bit_compute_dtype": "float32"},
        "lora": {"r": 8, "lora_alpha": 16} | sections.get("lora", {}),
        "data": {"datasets": [{"path": str(write_rows(directory / "rows.jsonl", pairs))}], "max_seq_length": 64}
        | sections.get("data", {}),
        "training": training | sections.get("training", {}),
        "memory": {"plan": False},
    }
    return json.dumps(values | {name: values.get(name, {}) | section for name, section in sections.items()}, indent=1)


def recipe(model: Path, directory: Path, method: str = "lora", pairs=PAIRS, **sections: dict) -> Config:
    """`recipe_text`, read."""
    return parse_recipe(recipe_text(model, directory, method, pairs, **sections))
