"""The adapter directory: what a run leaves behind, in PEFT's format, with all that is needed to use and to trust it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora import durable
from qlora.config import LoraSection
from qlora.errors import AdapterError
from qlora.model.untrusted import read_json
from qlora.redact import redact, redacted

RUN_FILE = "run.json"  # the run's facts, for programs
_ADVICE = "the last checkpoint is whole: once it can be written, --resume writes it, without training"
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

    All of it is there at its end, and `run.json`, which has every file's SHA-256, last. Raises MachineError where it
    cannot be written.
    """
    is_adapter = isinstance(model, PeftModel)
    base, facts = redact(base), redacted(facts)
    if is_adapter:
        for config in model.peft_config.values():
            config.base_model_name_or_path, config.revision = base, revision
    how: dict[str, Any] = {"save_embedding_layers": False} if is_adapter else {}  # a base's are the base's
    written = card(directory.resolve().name, recipe, base, revision, facts, is_adapter)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with durable.new_files(directory, RUN_FILE) as draft, full_disk_as_os_error():
            model.save_pretrained(str(draft.path), **how)
            tokenizer.save_pretrained(draft.path)
            draft.write("recipe.yaml", recipe.encode())
            (draft.path / "README.md").unlink(missing_ok=True)  # PEFT's, an empty form
            draft.write("README.md", written.encode())
            files = {name: record.model_dump() for name, record in draft.adopt().items()}
            run = json.dumps({**facts, "files": files}, indent=1, ensure_ascii=False) + "\n"
            draft.write(RUN_FILE, run.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise durable.disk_error(directory, error, nbytes(model, tokenizer), _ADVICE) from error


def nbytes(model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """About how many bytes `write` writes: exact for the weights, roomy for what lies beside them."""
    weights = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return weights + 256 * len(tokenizer) + (1 << 20)


@contextmanager
def full_disk_as_os_error() -> Iterator[None]:
    """safetensors and tokenizers write in Rust, with errors of their own for a full disk; they tell its number."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


def written(directory: Path) -> list[Path]:
    """What lies there under names that `write` writes, whoever wrote it; `run.json` last."""
    found = {path for pattern in (*FILES, RUN_FILE) for path in directory.glob(pattern)}
    return sorted(found, key=lambda path: (path.name == RUN_FILE, path.name))


def is_there(directory: Path) -> bool:
    """Whether `write` has written there."""
    return (directory / RUN_FILE).is_file()


def remove(directory: Path) -> None:
    """Take away what `write` left there; the files of a directory that it has not written to are somebody else's."""
    if is_there(directory):
        for path in written(directory):
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


def section_of(directory: Path) -> LoraSection:
    """An adapter's own configuration as a recipe's `lora` section. Raises AdapterError where it is none of LoRA's."""
    path = directory / "adapter_config.json"
    found = read_json(path, AdapterError)
    known = {key: found[key] for key in LoraSection.model_fields if found.get(key) is not None}
    # How A and B started is past. `autocast_adapter_dtype` is no key of PEFT's file: its own default holds.
    known.pop("init_lora_weights", None)
    if isinstance(names := known.get("target_modules"), list):
        known["target_modules"] = sorted(names)  # PEFT writes a set
    try:
        return LoraSection.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise AdapterError(f"{path}: `{'.'.join(map(str, first['loc']))}`: {first['msg']}") from error


def weights_sha256(directory: Path) -> str:
    """SHA-256 of an adapter's weights. Raises AdapterError where there are none."""
    path = directory / "adapter_model.safetensors"
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror or error}") from error


def card(
    name: str, recipe: str | None, base: str, revision: str | None, facts: Mapping[str, Any], is_adapter: bool = True
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
            *(["| figure | measured |", "|---|---|", rows, ""] if rows else []),
            *(["## Recipe", "", "```yaml", recipe.strip(), "```", ""] if recipe else []),
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
