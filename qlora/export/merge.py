"""An adapter merged into its base, tensor by tensor.

    base's tensor, under its own name ─> the model's dtype ─> (through NF4, as in training) ─> PEFT's merge

`Merged` is a mapping from a checkpoint's names to tensors that are made when they are asked for, so that whoever reads
it, a writer of shards or transformers itself, has one of them on the host at a time. On a CPU that takes a tensor's own
memory, a quarter of it for its four bits, and some 300 MiB for the pieces that arithmetic is done on. Experts that the
model has stacked and the checkpoint has one by one are made together: there it is a few times the stack.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from qlora.config import Config
from qlora.errors import AdapterError, ModelError
from qlora.export.changes import WEIGHTS_FILE, Changes, requantize
from qlora.model.load import build_skeleton, four_bit_of, four_bit_targets, generation_config_of
from qlora.model.nf4 import FourBit
from qlora.model.shards import DTYPES
from qlora.model.source import Source
from qlora.model.untrusted import foreign

__all__ = ["Merged", "Weights"]

Weights = Literal["original", "dequantized"]


class Merged(Mapping[str, Any]):
    """A base's checkpoint with an adapter merged in, or none: name -> what gives the tensor when sliced with `[...]`.

    config   the model's, untied where the adapter changed one of two tied weights
    places   name -> (dtype, shape)
    weights  which base the adapter is merged into

    Raises AdapterError where the adapter does not belong to this base or is more than can be merged, ModelError where
    the base is not whole.
    """

    def __init__(
        self,
        adapter: Path | None,
        source: Source,
        config: Config,
        weights: Weights,
        device: torch.device | None = None,
        beside: Merged | None = None,
    ) -> None:
        """
        adapter None: the base alone, as training saw it where `weights` are dequantized
        config  the recipe that the adapter was trained by: what its base was quantized as
        device  where the arithmetic is done; that of the training gives the very weights of the training
        beside  the same with other weights: what it has read of the base's headers is not read again
        """
        self.source, self.weights, self.device = source, weights, device or torch.device("cpu")
        self._adapter = adapter
        read = source.config(config.model.trust_remote_code) if beside is None else beside.read_config
        self.read_config = copy.deepcopy(read)
        model = build_skeleton(read, config, source.name)
        self.config, self.dtype = copy.deepcopy(model.config), model.dtype
        self._generation = generation_config_of(source, model)
        self._parameters = dict(model.state_dict())
        self._four_bit: FourBit | None = None
        self._quantized: frozenset[str] = frozenset()
        if weights == "dequantized":
            self._four_bit, self._quantized = four_bit_of(config.quantization), frozenset(four_bit_targets(model))
        tied = _tied(model)
        self._tensors = source.tensors(model) if beside is None else beside._tensors
        self._groups = _groups(self._tensors, model, source)
        self._check_whole(tied)
        self._model = model
        self._changes = Changes(adapter, model, self._parameters)
        self._untie(tied)
        self._lock = threading.RLock()  # transformers reads with several threads
        self._held: dict[str, torch.Tensor] = {}
        self._group_of = {name: group for group in self._groups for name in group.names}
        self.places: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for group in self._groups:
            self.places.update(group.places(self._parameters, self._tensors))

    def __getitem__(self, name: str) -> _Lazy:
        if name not in self._group_of:
            raise KeyError(name)
        return _Lazy(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._group_of)

    def __len__(self) -> int:
        return len(self._group_of)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self.nbytes_of, self.places))

    def nbytes_of(self, name: str) -> int:
        """Bytes of one tensor."""
        dtype, shape = self.places[name]
        return dtype.itemsize * math.prod(shape)

    @property
    def together(self) -> list[list[str]]:
        """All names, in the checkpoint's order, by what is made at once."""
        return [group.names for group in self._groups]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the host. Those that had to be made with it are kept until they are asked for."""
        with self._lock, torch.no_grad():
            if name in self._held:
                return self._held.pop(name)
            made = self._group_of[name].make(self, name)
            wanted = made.pop(name)
            self._held.update(made)
            return wanted

    def identity(self) -> str:
        """SHA-256 of all that decides what is written."""
        digest = hashlib.sha256(self.source.fingerprint().encode())
        if self._adapter is not None:
            for name in ("adapter_config.json", WEIGHTS_FILE):
                with (self._adapter / name).open("rb") as f:
                    digest.update(hashlib.file_digest(f, "sha256").digest())
        facts = [self.weights, repr(self._four_bit), sorted((n, str(p)) for n, p in self.places.items())]
        digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    def load(self, device: torch.device) -> PreTrainedModel:
        """The merged model in memory, as transformers would load it from what `write` writes."""
        cls: Any = type(self._model)
        with foreign(f"{self.source.name}: cannot be loaded as merged"), torch.no_grad():
            model, info = cls.from_pretrained(
                None,
                config=copy.deepcopy(self.config),
                state_dict=self,
                dtype=self.dtype,
                attn_implementation=self._model.config._attn_implementation,
                device_map={"": device},
                output_loading_info=True,
            )
        if missing := sorted(info["missing_keys"]):
            raise ModelError(f"{self.source.name}: merged, it lacks {len(missing)} weights, {missing[0]} first")
        return model.eval()

    def save_config(self, directory: Path) -> None:
        """Write config.json and generation_config.json."""
        config: Any = copy.deepcopy(self.config)
        config.architectures, config.dtype = [type(self._model).__name__], self.dtype
        config.save_pretrained(directory)
        self._generation.save_pretrained(directory)

    def change(self, name: str, dense: torch.Tensor) -> torch.Tensor:
        """A parameter of the model [its shape, its dtype] as it is after the merge; `dense` may be overwritten."""
        if name in self._quantized and self._four_bit is not None:
            dense = requantize(dense, self._four_bit, self.device)
        return self._changes.apply(name, dense, self.device)

    def touches(self, name: str) -> bool:
        """Whether a parameter of the model is another one after the merge."""
        return name in self._quantized or name in self._changes

    def _check_whole(self, tied: Sequence[set[str]]) -> None:
        there = {parameter for group in self._groups for parameter in group.parameters}
        for names in tied:
            if names & there:
                there |= names
        if missing := sorted(self._parameters.keys() - there):
            raise ModelError(f"{self.source.name}: lacks {len(missing)} weights that the model has, {missing[0]} first")

    def _untie(self, tied: Sequence[set[str]]) -> None:
        """Where a weight that stood in two places is changed in one, both are written."""
        for names in tied:
            if not names & self._changes.keys():
                continue
            there = {p: group for group in self._groups for p in group.parameters if p in names}
            first = next(iter(there.values()))
            if not isinstance(first, _One):
                raise AdapterError(f"{self._adapter}: changes {sorted(names)[0]}, which cannot be untied")
            self._groups.extend(_One(name, name, first.reads) for name in sorted(names - there.keys()))
            for part in {id(c): c for c in (self.config, self.config.get_text_config())}.values():
                part.tie_word_embeddings = False


@dataclasses.dataclass(frozen=True, slots=True)
class _Lazy:
    merged: Merged
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.merged.tensor(self.name)[index]


@dataclasses.dataclass(frozen=True, slots=True)
class _One:
    """A tensor of the checkpoint that is a parameter of the model, or nothing that the model knows.

    reads  the tensor's name where it lies, `name` but for a weight that was tied
    """

    name: str
    parameter: str | None
    reads: str

    @property
    def names(self) -> list[str]:
        return [self.name]

    @property
    def parameters(self) -> list[str]:
        return [] if self.parameter is None else [self.parameter]

    def places(self, parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, Any]) -> dict[str, Any]:
        if self.parameter is None:
            return {self.name: _header(tensors[self.reads])}
        like = parameters[self.parameter]
        return {self.name: (like.dtype, tuple(like.shape))}

    def make(self, merged: Merged, name: str) -> dict[str, torch.Tensor]:
        tensor = merged._tensors[self.reads][...]
        if self.parameter is None:
            return {self.name: tensor}
        like = merged._parameters[self.parameter]
        if tensor.shape != like.shape:
            raise ModelError(
                f"{merged.source.name}: {self.reads} is {list(tensor.shape)}, the model has {list(like.shape)}"
            )
        tensor = tensor.to(like.dtype)
        return {self.name: merged.change(self.parameter, tensor) if merged.touches(self.parameter) else tensor}


class _Many:
    """Tensors of the checkpoint that transformers makes into others: experts that it stacks, for example."""

    def __init__(self, converter: WeightConverter, target: str, members: Sequence[tuple[str, str]]) -> None:
        """members: (name, pattern of the converter that it matched), in the order in which they are read."""
        self._converter, self._target, self._members = converter, target, list(members)
        self.names, self.parameters = [name for name, _ in members], []

    def plan(self, model: PreTrainedModel, tensors: Mapping[str, Any]) -> None:
        """Find out on tensors without values what becomes of them, and that it can be undone. Raises ModelError."""
        self.model = model
        headers = {name: _header(tensors[name]) for name in self.names}
        empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in headers.items()}
        with foreign(f"{self.names[0]}: cannot be converted as transformers loads it"):
            converted = self._convert(empty)
            back = revert_weight_conversion(model, dict(converted))
        if {n: t.shape for n, t in back.items()} != {n: t.shape for n, t in empty.items()}:
            raise ModelError(f"{self.names[0]}: cannot be written under its checkpoint's own names after the merge")
        self.parameters = list(converted)

    def places(self, parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, Any]) -> dict[str, Any]:
        dtype = parameters[self.parameters[0]].dtype
        return {name: (dtype, _header(tensors[name])[1]) for name in self.names}

    def make(self, merged: Merged, name: str) -> dict[str, torch.Tensor]:
        dtype, touched = merged._parameters[self.parameters[0]].dtype, any(map(merged.touches, self.parameters))
        read = {each: merged._tensors[each][...].to(dtype) for each in (self.names if touched else [name])}
        if not touched:
            return read
        converted = self._convert(read)
        read.clear()
        changed = {p: merged.change(p, t) if merged.touches(p) else t for p, t in converted.items()}
        return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(self.model, changed).items()}

    def _convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(self._converter)
        for name, pattern in self._members:
            converter.add_tensor(self._target, name, pattern, tensors[name])  # type: ignore[arg-type]
        made: Any = converter.convert(self._target, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _groups(tensors: Mapping[str, Any], model: PreTrainedModel, source: Source) -> list[Any]:
    """What must be made together, by transformers' own renaming on the way into the model."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    known, groups, members = model.state_dict(), [], {}
    for name in sorted(tensors, key=_natural):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if target not in known:
            groups.append(_One(name, None, name))
        elif pattern is None:
            groups.append(_One(name, target, name))
        else:
            members.setdefault(target, []).append((name, pattern))
    cast_model: Any = model
    cast_model._weight_conversions = [entry for entry in mapping if entry.was_used()]  # as after from_pretrained
    for target, found in members.items():
        group = _Many(by_pattern[found[0][1]], target, found)
        group.plan(model, tensors)
        groups.append(group)
    return groups


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Layer 10 after layer 9: experts are stacked in this order."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _header(tensor: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape of a tensor that is not read, where it lies in safetensors."""
    if not hasattr(tensor, "path"):
        found = tensor[...]  # GGUF: of a tensor that the model does not know, none or small ones
        return found.dtype, tuple(found.shape)
    with safe_open(tensor.path, framework="pt") as f:
        described = f.get_slice(tensor.name)
        return DTYPES[described.get_dtype()], tuple(described.get_shape())


def _tied(model: PreTrainedModel) -> list[set[str]]:
    """Names of the parameters that are one and the same, where there are several."""
    model.tie_weights()
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return [group for group in names.values() if len(group) > 1]
