"""A base model's files: where they are, whether they are whole, and their tensors one at a time.

A source is a hub id, a directory with safetensors, or a .gguf file. A tensor is read when it is asked for and belongs
to whoever asked, so that a checkpoint passes through the host one tensor at a time. Only safetensors and GGUF are
read: neither can carry code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora.config import ModelConfig
from qlora.errors import ModelError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that was found and is whole.

    name       as the recipe has it
    directory  where its files lie
    gguf       the .gguf file, where the source is one
    files      its weight files
    revision   the commit of a hub model, else None
    """

    name: str
    directory: Path
    gguf: Path | None
    files: tuple[Path, ...]
    revision: str | None

    @property
    def _gguf_argument(self) -> dict[str, str]:
        return {"gguf_file": self.gguf.name} if self.gguf else {}

    def config(self, trust_remote_code: bool = False) -> PreTrainedConfig:
        """The model's configuration."""
        try:
            return AutoConfig.from_pretrained(
                self.directory, trust_remote_code=trust_remote_code, **self._gguf_argument
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"{self.name}: transformers cannot read its configuration: {error}") from error

    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with its chat template where it has one."""
        try:
            return AutoTokenizer.from_pretrained(
                self.directory, trust_remote_code=trust_remote_code, **self._gguf_argument
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"{self.name}: transformers cannot read its tokenizer: {error}") from error

    def tensors(self, skeleton: PreTrainedModel) -> Mapping[str, Any]:
        """Name -> something that gives the tensor when sliced with `[...]`.

        skeleton  the model without weights: GGUF's tensor names are translated by its own
        """
        if self.gguf is not None:
            return _gguf_tensors(self.gguf, skeleton)
        tensors: dict[str, Any] = {}
        for path in self.files:
            with safe_open(path, framework="pt") as f:
                tensors.update({name: SafetensorsTensor(path, name) for name in f.keys()})  # noqa: SIM118 - no dict
        return tensors


def open_source(section: ModelConfig) -> Source:
    """Find a base model and look whether its files are whole.

    Raises ModelError that names what is missing, truncated or unreadable.
    """
    name, path = section.model_name_or_path, Path(section.model_name_or_path).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"{name}: no such file")
        with path.open("rb") as f:
            if f.read(4) != b"GGUF":
                raise ModelError(f"{name}: not a GGUF file (it does not begin with the letters GGUF)")
        return Source(name, path.parent, path, (path,), None)
    if path.is_dir():
        return Source(name, path, None, _safetensors_in(path, name), None)
    _refuse_paths(name, path)
    directory, revision = _download(name, section.revision, section.trust_remote_code)
    return Source(name, directory, None, _safetensors_in(directory, name), revision)


def _refuse_paths(name: str, path: Path) -> None:
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"{name}: no such directory, and not a hub id (`user/model`) either")


def config_of(section: ModelConfig) -> PreTrainedConfig:
    """The configuration of a base model, without its weights: of a hub id only config.json is fetched.

    `model_name_or_path` may be a config.json file too. Raises ModelError where there is none to read.
    """
    name, path = section.model_name_or_path, Path(section.model_name_or_path).expanduser()
    if path.suffix.lower() == ".gguf":
        return open_source(section).config(section.trust_remote_code)
    if path.suffix == ".json" and path.is_file():
        try:
            facts = json.loads(path.read_text())
            return AutoConfig.for_model(**facts)
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{name}: not a configuration that transformers can read: {error}") from error
    if not path.is_dir():
        _refuse_paths(name, path)
    elif not (path / "config.json").is_file():
        raise ModelError(f"{name}: has no config.json")
    try:
        return AutoConfig.from_pretrained(
            path if path.is_dir() else name, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        said = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{name}: its configuration cannot be read: {said}\n"
            "  give a directory or a config.json file; a gated model needs `hf auth login` first"
        ) from error


def _download(name: str, revision: str | None, with_code: bool) -> tuple[Path, str]:
    """Fetch what is not in the hub's cache yet; returns where it is, and the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", *(["*.py"] if with_code else [])]
    try:
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name}: not a local directory, not in the hub's cache, and the hub cannot be reached\n"
            "  give the path of a directory with safetensors files or of a .gguf file, or go online once"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{name}: cannot be fetched from the hub: {error}") from error
    return directory, directory.name  # a snapshot's directory bears its commit


def _safetensors_in(directory: Path, name: str) -> tuple[Path, ...]:
    """The weight files of a directory, each opened once: a truncated one does not open."""
    index = directory / INDEX
    if index.is_file():
        try:
            placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{index}: not an index of safetensors shards: {error}") from error
        files = tuple(directory / shard for shard in sorted(set(placed.values())))
        outside = [str(f) for f in files if f.parent.resolve() != directory.resolve()]
        if outside:
            raise ModelError(f"{index}: names files outside its directory: {', '.join(outside)}")
        if missing := [f.name for f in files if not f.is_file()]:
            raise ModelError(f"{name}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing[:4])}")
    else:
        placed = {}
        files = tuple(sorted(directory.glob("*.safetensors")))
        if not files:
            raise ModelError(f"{name}: {directory} has no .safetensors file{_instead(directory)}")
    held: set[str] = set()
    for path in files:
        try:
            with safe_open(path, framework="pt") as f:
                held.update(f.keys())
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise ModelError(f"{path}: truncated or not a safetensors file ({size:,} bytes): {error}") from error
    if lost := sorted(set(placed) - held):
        raise ModelError(f"{name}: its index promises {len(lost)} tensors that no shard holds: {', '.join(lost[:3])}")
    return files


def _instead(directory: Path) -> str:
    if gguf := sorted(directory.glob("*.gguf")):
        return f"\n  to train on a GGUF file give its path: {gguf[0]}"
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        return "\n  it has pickled weights, which can carry code; convert them to safetensors first"
    return ""


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """One tensor of a file, read when sliced."""

    path: Path
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        # Opened for one tensor: a map of the whole file would count as this process's memory, page by page read.
        with safe_open(self.path, framework="pt", backend="pread") as f:
            return f.get_tensor(self.name)[index]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file, dequantized and in transformers' layout when sliced."""

    entry: Any
    processor: Any
    names: Mapping[str, str]

    def __getitem__(self, index: Any) -> torch.Tensor:
        from gguf import dequantize

        weights = dequantize(self.entry.data, self.entry.tensor_type)
        result = self.processor.process(
            weights=weights, name=self.entry.name, tensor_key_mapping=self.names, parsed_parameters={"tensors": {}}
        )
        return torch.from_numpy(result.weights.copy())[index]


def _gguf_tensors(path: Path, skeleton: PreTrainedModel) -> Mapping[str, Any]:
    """As `Source.tensors`, by transformers' own translation of names and layouts."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    try:
        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(skeleton.config.to_dict())
        names = get_gguf_hf_weights_map(skeleton, processor)
    except (ValueError, KeyError, IndexError, OSError, NotImplementedError) as error:
        raise ModelError(f"{path}: truncated, or not a GGUF file that transformers can read: {error}") from error
    unknown = [entry.name for entry in reader.tensors if entry.name.startswith("blk.") and entry.name not in names]
    if unknown:
        # Some mixtures of experts are split and merged on the way in, several tensors at a time.
        raise ModelError(
            f"{path}: {len(unknown)} tensors of architecture `{architecture}` cannot be read one at a time, "
            f"{unknown[0]} first\n  use the model's safetensors instead"
        )
    return dict(_named(reader.tensors, processor, names))


def _named(entries: Any, processor: Any, names: Mapping[str, str]) -> Iterator[tuple[str, GgufTensor]]:
    for entry in entries:
        if entry.name in names:
            yield names[entry.name], GgufTensor(entry, processor, names)
