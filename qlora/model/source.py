"""A base model's files: where they are, whether they are whole, and their tensors one at a time.

A source is a hub id, a directory with safetensors, or a .gguf file. A tensor is read when it is asked for and belongs
to whoever asked, so that a checkpoint passes through the host one tensor at a time. Only safetensors and GGUF are
read: neither can carry code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from qlora.config import ModelConfig
from qlora.errors import ModelError, QLoRAError
from qlora.model.gguf_header import check_gguf
from qlora.model.untrusted import (
    PICKLES,
    check_config,
    foreign,
    inspect,
    member,
    read_json,
    refuse_links,
    refuse_pickle,
)

INDEX = "model.safetensors.index.json"

_PIECES, _PIECE = 256, 4096  # of each weight file, in a fingerprint


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

    def config(self, trust_remote_code: bool = False) -> PreTrainedConfig:
        """The model's configuration."""
        inspect(self.directory, trust_remote_code=trust_remote_code)
        with foreign(f"{self.name}: transformers cannot read its configuration"):
            return AutoConfig.from_pretrained(
                self.directory, trust_remote_code=trust_remote_code, **_gguf_argument(self.gguf)
            )

    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with its chat template where it has one."""
        return _tokenizer(self.directory, self.name, ModelError, trust_remote_code, self.gguf)

    def fingerprint(self) -> str:
        """SHA-256 over each weight file's name, size and 256 pieces of 4 KiB, spread evenly from its first byte to its
        last, and over config.json: about 1 MiB read for each file, whatever its size.

        Tells another model, another fine-tune of it, another quantization, or a file that is truncated or whose tensors
        were moved: those differ nearly everywhere. Cannot tell a change of few bytes between the pieces; a file's
        whole hash can.
        """
        digest = hashlib.sha256()
        with foreign(f"{self.name}: cannot be read"):
            for path in sorted(self.files):
                with path.open("rb", buffering=0) as f:
                    size = f.seek(0, 2)
                    digest.update(f"{path.name}\0{size}\0".encode())
                    last = max(size - _PIECE, 0)
                    for offset in dict.fromkeys(last * k // (_PIECES - 1) for k in range(_PIECES)):
                        f.seek(offset)
                        digest.update(f.read(_PIECE))
            if self.gguf is None and (self.directory / "config.json").is_file():
                digest.update((self.directory / "config.json").read_bytes())
        return digest.hexdigest()

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
    name, path = section.model_name_or_path, _place(section.model_name_or_path)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise ModelError(f"{name}: no such file")
        check_config(dict(check_gguf(path)), path)
        return Source(name, path.parent, path, (path,), None)
    if path.is_dir():
        refuse_links(path)
        return Source(name, path, None, _safetensors_in(path, name), None)
    refuse_pickle(path)
    _refuse_paths(name, path)
    directory, revision = _download(name, section.revision, section.trust_remote_code)
    return Source(name, directory, None, _safetensors_in(directory, name), revision)


def _place(name: str) -> Path:
    try:
        path = Path(name).expanduser()
        path.exists()
        return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, the home of nobody
        raise ModelError(f"{name[:300]!r}: neither a path nor a hub id: {error}") from error


def _refuse_paths(name: str, path: Path) -> None:
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"{name}: no such directory, and not a hub id (`user/model`) either")


def config_of(section: ModelConfig) -> PreTrainedConfig:
    """The configuration of a base model, without its weights: of a hub id only config.json is fetched.

    `model_name_or_path` may be a config.json file too. Raises ModelError where there is none to read.
    """
    name, path = section.model_name_or_path, _place(section.model_name_or_path)
    if path.suffix.lower() == ".gguf":
        return open_source(section).config(section.trust_remote_code)
    trust = section.trust_remote_code
    if path.suffix == ".json" and path.is_file():
        facts = read_json(path)
        check_config(facts, path)
        with foreign(f"{name}: not a configuration that transformers can read"):
            return AutoConfig.for_model(**facts)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: has no config.json")
        inspect(path, ("config.json",), trust_remote_code=trust)
    else:
        refuse_pickle(path)
        _refuse_paths(name, path)
    where: str | Path = path
    if not path.is_dir():
        try:
            fetched = Path(str(cached_file(name, "config.json", revision=section.revision)))
        except (OSError, ValueError) as error:
            said = str(error).strip().split("\n")[0]
            raise ModelError(
                f"{name}: its configuration cannot be read: {said}\n"
                "  give a directory or a config.json file; a gated model needs `hf auth login` first"
            ) from error
        check_config(read_json(fetched), fetched, trust_remote_code=trust)
        where = name if trust else fetched.parent  # code of its own lies beside it on the hub
    with foreign(f"{name}: its configuration cannot be read"):
        return AutoConfig.from_pretrained(where, revision=section.revision, trust_remote_code=trust)


def read_tokenizer(directory: Path, error: type[QLoRAError] = ModelError) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory, an adapter's for example. None of its files has code run. Raises `error`."""
    return _tokenizer(directory, str(directory), error)


def _tokenizer(
    directory: Path, name: str, error: type[QLoRAError], trust_remote_code: bool = False, gguf: Path | None = None
) -> PreTrainedTokenizerBase:
    inspect(directory, error=error, trust_remote_code=trust_remote_code)
    with foreign(f"{name}: transformers cannot read its tokenizer", error):
        return AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True, **_gguf_argument(gguf)
        )


def _gguf_argument(gguf: Path | None) -> dict[str, str]:
    return {"gguf_file": gguf.name} if gguf else {}


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
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise ModelError(f"{index}: not an index of safetensors shards: it has no weight_map")
        named = {str(shard): member(directory, shard, index) for shard in placed.values()}
        files = tuple(named[shard] for shard in sorted(named))
        if missing := [f.name for f in files if not f.is_file()]:
            raise ModelError(f"{name}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing[:4])}")
        for path in files:
            refuse_pickle(path)
    else:
        placed = {}
        files = tuple(sorted(directory.glob("*.safetensors")))
        if not files:
            raise ModelError(f"{name}: {directory} has no .safetensors file{_instead(directory)}")
    held: set[str] = set()
    for path in files:
        size = path.stat().st_size
        unreadable = foreign(f"{path}: truncated or not a safetensors file ({size:,} bytes)")
        with unreadable, safe_open(path, framework="pt") as f:
            held.update(f.keys())
    if lost := sorted(set(placed) - held):
        raise ModelError(f"{name}: its index promises {len(lost)} tensors that no shard holds: {', '.join(lost[:3])}")
    return files


def _instead(directory: Path) -> str:
    if gguf := sorted(directory.glob("*.gguf")):
        return f"\n  to train on a GGUF file give its path: {gguf[0]}"
    if pickles := sorted(path.name for path in directory.iterdir() if path.suffix.lower() in PICKLES):
        return (
            f"\n  it has pickled weights, which can carry code and are never opened ({pickles[0]})"
            "\n  convert them to safetensors first, where you trust them"
        )
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

    with foreign(f"{path}: truncated, or not a GGUF file that transformers can read"):
        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(skeleton.config.to_dict())
        names = get_gguf_hf_weights_map(skeleton, processor)
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
