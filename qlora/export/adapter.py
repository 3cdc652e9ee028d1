"""The adapter directory: what a run leaves behind, in PEFT's format, with all that is needed to use and to trust it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.errors import AdapterError

RUN_FILE = "run.json"  # the run's facts, for programs
# All that `write` writes. A later run under another method would not overwrite each of them.
FILES = ("adapter_*", "model*.safetensors*", "*config.json", "tokenizer*", "chat_template*", "recipe.yaml", "README.md")


def write(
    directory: Path,
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: str,
    base: str,
    revision: str | None,
    facts: Mapping[str, Any],
) -> None:
    """Write adapter (or, for full fine-tuning, model), tokenizer with template, recipe, facts and a model card.

    recipe    the recipe as YAML
    base      the base model, as the recipe names it
    revision  its commit, where it came from a hub
    facts     measured figures, versions and fingerprints, JSON-able
    """
    is_adapter = isinstance(model, PeftModel)
    if is_adapter:
        for config in model.peft_config.values():
            config.base_model_name_or_path, config.revision = base, revision
    directory.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"save_embedding_layers": False} if is_adapter else {}  # a base's are the base's
    model.save_pretrained(str(directory), **how)
    tokenizer.save_pretrained(directory)
    (directory / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (directory / RUN_FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    written = card(directory.resolve().name, recipe, base, revision, facts, is_adapter)
    (directory / "README.md").write_text(written, encoding="utf-8")


def is_there(directory: Path) -> bool:
    """Whether `write` has written there."""
    return (directory / RUN_FILE).is_file()


def remove(directory: Path) -> None:
    """Take away what `write` left there; the files of a directory that it has not written to are somebody else's."""
    if is_there(directory):
        for pattern in (*FILES, RUN_FILE):
            for path in directory.glob(pattern):
                path.unlink()


def facts(figures: Mapping[str, Any], data: str, device: str) -> dict[str, Any]:
    """What is worth knowing of a run: measured figures, the data's fingerprint, the versions it was made with."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
    return {
        "measured": dict(figures),
        "data_sha256": data,
        "device": device,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def base_of(directory: Path) -> tuple[str, str | None]:
    """The base model and revision that an adapter names. Raises AdapterError where it is no adapter, or names none."""
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        return str(config["base_model_name_or_path"]), config.get("revision")
    except FileNotFoundError:
        raise AdapterError(f"{directory}: no adapter there (it has no adapter_config.json)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{directory}/adapter_config.json: names no base model: {error}") from error


def card(
    name: str, recipe: str, base: str, revision: str | None, facts: Mapping[str, Any], is_adapter: bool = True
) -> str:
    """The model card, with the metadata that model hubs read."""
    rows = "\n".join(f"| {key.replace('_', ' ')} | {_shown(value)} |" for key, value in _flat(facts))
    local = Path(base).expanduser().exists()  # where hubs would look for a model of theirs
    metadata = {
        "library_name": "peft" if is_adapter else "transformers",
        **({} if local else {"base_model": base}),
        "tags": ["lora", "qlora"] if is_adapter else ["qlora"],
    }
    at = f" at `{revision}`" if revision else ""
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=False).strip(),
            "---",
            f"# {name}",
            "",
            f"{'A LoRA adapter for' if is_adapter else 'Every weight trained, starting from'} `{base}`{at}.",
            "",
            "```python",
            "import qlora",
            f'print(qlora.generate("{name}", "..."))',
            "```",
            "",
            "| figure | measured |",
            "|---|---|",
            rows,
            "",
            "## Recipe",
            "",
            "```yaml",
            recipe.strip(),
            "```",
            "",
        ]
    )


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        row
        for key, value in facts.items()
        for row in (_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)])
    ]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"`{value}`" if isinstance(value, str) else str(value)
