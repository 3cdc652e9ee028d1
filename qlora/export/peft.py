"""The adapter as PEFT, vLLM and transformers load it, and where it comes from told in the weights' file too.

A run's own directory is nearly that already. Its weights' file is left as PEFT writes it: by its SHA-256 one knows that
two runs came to the same adapter, and time and place of a run would be in it. What is exported has them in its header,
where they stay when the file is passed on alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora import durable
from qlora.durable import Writer
from qlora.errors import AdapterError
from qlora.export.adapter import RUN_FILE, base_of, card, full_disk_as_os_error
from qlora.export.certificate import Certificate, with_certificate
from qlora.export.writing import check_place
from qlora.model.adapters import read_config
from qlora.model.untrusted import read_json
from qlora.redact import redact, redacted

__all__ = ["export_peft", "provenance"]

_CONFIG, _WEIGHTS, _RECIPE, _CARD = "adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "README.md"
_ADVICE = "give --out a directory on a disk with more room"


def export_peft(
    adapter: Path, out: Path, tokenizer: PreTrainedTokenizerBase, name: str, certificate: Certificate | None = None
) -> None:
    """Write an adapter, a run's or any PEFT LoRA directory, to `out`, whole or not at all.

    There are then its weights with `provenance` in their header, configuration, tokenizer with template, card, recipe
    and facts, so far as it has them, and a manifest of every file's SHA-256.

    tokenizer    with the template that the adapter was trained with
    name         what the card calls it, where it has no card
    certificate  of the same adapter merged: the card shows it

    Raises AdapterError for what is no adapter, or where something else stands at `out`; MachineError where it cannot be
    written.
    """
    read_config(adapter)
    check_place(out)
    about = provenance(adapter)
    texts = {each: _text(adapter / each) for each in (_RECIPE, _CARD) if (adapter / each).is_file()}
    told = texts.get(_CARD) or card(name, texts.get(_RECIPE), *_base(adapter), {})
    texts[_CARD] = told if certificate is None else with_certificate(told, certificate)
    facts = redacted(read_json(adapter / RUN_FILE, AdapterError)) if (adapter / RUN_FILE).is_file() else None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with durable.new_directory(out) as draft, full_disk_as_os_error():
            with draft.writer(_WEIGHTS) as writer:
                _copy_weights(adapter / _WEIGHTS, writer, about)
            draft.write(_CONFIG, _json(redacted(read_json(adapter / _CONFIG, AdapterError))))
            tokenizer.save_pretrained(draft.path)
            for each, text in texts.items():
                draft.write(each, text.encode())
            if facts is not None:  # whose hashes were those of the run's files
                files = {name: record.model_dump() for name, record in draft.adopt().items()}
                draft.write(RUN_FILE, _json(facts | {"files": files}))
            draft.adopt()
    except OSError as error:
        nbytes = sum(path.stat().st_size for path in adapter.iterdir() if path.is_file())
        raise durable.disk_error(out, error, nbytes, _ADVICE) from error


def provenance(adapter: Path) -> dict[str, str]:
    """Where an adapter comes from, as safetensors can hold it; without secrets. What is not known is not there.

    base            JSON: the base's name, revision and fingerprint
    recipe          YAML
    measured        JSON: the run's figures
    versions        JSON: the packages that it was made with
    data_sha256     of the rows that it was trained on
    continued_from  SHA-256 of the weights that its training went on from
    """
    name, revision = _base(adapter)
    run = read_json(adapter / RUN_FILE, AdapterError) if (adapter / RUN_FILE).is_file() else {}
    base = run.get("base")
    found: dict[str, Any] = {"base": {"name": name, "revision": revision} | (base if isinstance(base, dict) else {})}
    found |= {key: run.get(key) for key in ("data_sha256", "measured", "versions", "continued_from")}
    found["recipe"] = _text(adapter / _RECIPE) if (adapter / _RECIPE).is_file() else None
    told = {key: value if isinstance(value, str) else json.dumps(value) for key, value in redacted(found).items()}
    return {key: value for key, value in told.items() if found[key] is not None}


def _base(adapter: Path) -> tuple[str, str | None]:
    name, revision = base_of(adapter)
    return redact(name), revision


def _copy_weights(path: Path, writer: Writer, about: Mapping[str, str]) -> None:
    """A safetensors file with more in its header: what follows the header, and is counted from there, stays."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header["__metadata__"] = {"format": "pt", **redacted(header.get("__metadata__", {})), **about}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # as safetensors has it, so that tensors begin at multiples of 8
        writer.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(file, writer, 4 << 20)


def _text(path: Path) -> str:
    return redact(path.read_text(encoding="utf-8", errors="backslashreplace"))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
