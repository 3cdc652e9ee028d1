"""`qlora export`: an adapter in the forms that others take, each made whole or not at all.

peft        the adapter as PEFT, vLLM and transformers load it       <out>/peft/
merged      one 16-bit model, with a certificate of what it lost     <out>/merged/
gguf        the same as one file for llama.cpp                       <out>/<name>-f16.gguf
gguf-lora   the adapter alone for llama.cpp, on the base's .gguf     <out>/<name>-lora.gguf
ollama      a Modelfile over one of the last two                     <out>/Modelfile
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from qlora import durable
from qlora.config import Config
from qlora.data import chat
from qlora.data.prepare import prepare
from qlora.errors import AdapterError, DataError
from qlora.export import adapter as adapters
from qlora.export import gguf, ollama
from qlora.export.certificate import export_merged
from qlora.live import recipe_of
from qlora.machine import pick_device
from qlora.model.batch import Batch
from qlora.model.source import Source, open_source, read_tokenizer

KINDS = ("peft", "merged", "gguf", "gguf-lora", "ollama")
_ADVICE = "give --out a directory on a disk with more room"


def export(
    adapter: Path,
    kinds: Sequence[str],
    out: Path,
    *,
    name: str | None = None,
    weights: Literal["auto", "original", "dequantized"] = "auto",
    gguf_type: gguf.Kind = "f16",
    base: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write an adapter to `out` in each of the forms.

    adapter            a directory that `train` left, or any PEFT LoRA directory
    name               of the files; None: the directory's
    weights            what the adapter is merged into; see `export_merged`
    base               where the base lies now, instead of where the recipe says
    force              export what is not true to the adapter too
    trust_remote_code  run Python code that ships with the base

    Raises AdapterError, ModelError or MachineError; what was written before is whole.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise AdapterError(f"{adapter}: no adapter there (it has no adapter_config.json); a run that died has none yet")
    config, name = recipe_of(adapter, trust_remote_code), name or adapter.resolve().name
    if base is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"model_name_or_path": base})})
    source = open_source(config.model)
    tokenizer = _tokenizer(adapter, source, config)
    merged, model, lora = out / "merged", out / f"{name}-{gguf_type}.gguf", out / f"{name}-lora.gguf"
    for kind in (each for each in KINDS if each in kinds):  # what others are made of comes first
        match kind:
            case "peft":
                _copy(adapter, out / "peft")
                say(f"peft        {out / 'peft'}")
            case "merged":
                _merge(adapter, merged, config, source, tokenizer, weights, force, say)
                say(f"merged      {merged}")
            case "gguf":
                with tempfile.TemporaryDirectory(dir=_made(out), prefix=".merged.", suffix=".unfinished") as scratch:
                    if "merged" in kinds:
                        whole = merged
                    else:
                        whole = Path(scratch) / "merged"
                        _merge(adapter, whole, config, source, tokenizer, weights, force, say)
                    end = next(iter(chat.end_token_ids(tokenizer)), None)
                    gguf.write_gguf(whole, model, gguf_type, base_gguf=source.gguf, eos_token_id=end)
                say(f"gguf        {model}")
            case "gguf-lora":
                gguf.write_gguf_lora(adapter, lora, source)
                say(f"gguf-lora   {lora}")
            case "ollama":
                say(f"ollama      {_modelfile(out, model, lora, source, tokenizer)}")


def _merge(
    adapter: Path,
    out: Path,
    config: Config,
    source: Source,
    tokenizer: Any,
    weights: Literal["auto", "original", "dequantized"],
    force: bool,
    say: Callable[[str], None],
) -> None:
    export_merged(
        adapter,
        out,
        config=config,
        source=source,
        tokenizer=tokenizer,
        batches=_held_out(config, source, say),
        device=pick_device(),
        weights=weights,
        force=force,
        say=say,
    )


def _held_out(config: Config, source: Source, say: Callable[[str], None]) -> list[Batch]:
    """The held-out rows of the adapter's recipe, where they are still to be had."""
    try:
        batches = prepare(config, source.tokenizer(config.model.trust_remote_code)).held_out_batches(False)
        return [batches[i] for i in range(len(batches))]
    except DataError as error:
        say(f"the recipe's rows cannot be read: {error}")
        return []


def _modelfile(out: Path, model: Path, lora: Path, source: Source, tokenizer: Any) -> Path:
    def ask(messages: Sequence[dict[str, str]]) -> str:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return str(text)

    stops = [str(tokenizer.convert_ids_to_tokens(end)) for end in chat.end_token_ids(tokenizer)]
    template = ollama.go_template(ask, stops[0], tokenizer.bos_token) if tokenizer.chat_template and stops else None
    if model.is_file():
        return ollama.write_modelfile(out, model.name, template=template, stops=stops)
    if lora.is_file() and source.gguf is not None:
        base = str(source.gguf.resolve())
        return ollama.write_modelfile(out, base, adapter=lora.name, template=template, stops=stops)
    raise AdapterError("ollama: needs a model as .gguf: export gguf too, or gguf-lora where the base is a .gguf file")


def _copy(adapter: Path, out: Path) -> None:
    """What PEFT and those who load its directories read, and what tells where it comes from."""
    files = [path for path in adapters.written(adapter) if path.is_file()]
    try:
        _made(out.parent)
        with durable.new_directory(out) as draft:
            for path in files:
                shutil.copyfile(path, draft.path / path.name)
            draft.adopt()
    except OSError as error:
        raise durable.disk_error(out, error, sum(path.stat().st_size for path in files), _ADVICE) from error


def _tokenizer(adapter: Path, source: Source, config: Config) -> Any:
    """With the template that the adapter was trained with."""
    if (adapter / "tokenizer_config.json").is_file():
        return read_tokenizer(adapter)
    tokenizer = source.tokenizer(config.model.trust_remote_code)
    chat.set_chat_template(tokenizer, config.data.chat_template)
    return tokenizer


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise durable.disk_error(directory, error, 0, _ADVICE) from error
    return directory
