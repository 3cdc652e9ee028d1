"""An adapter merged into its base: 16-bit safetensors that transformers, vLLM and llama.cpp's converter read.

    base's tensor, under its own name ─> the model's dtype ─> (through NF4, as in training) ─> PEFT's merge ─> shard

`Merged` is a mapping from a checkpoint's names to tensors that are made when they are asked for, so that whoever reads
it, a writer of shards or transformers itself, has one of them on the host at a time. PEFT owns the arithmetic: the
adapter's layers stand on the meta device, and each is filled from the adapter's file, given its weight in fp32 a piece
at a time, and emptied again.

What is written goes to `.NAME.merging.unfinished` first. Each whole shard there has its SHA-256 in progress.json, and
is kept by the next merge of the same adapter, base and plan; nothing stands under NAME before all is there.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, Linear, MultiheadAttention, ParamWrapper
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from qlora import durable
from qlora.config import Config
from qlora.errors import AdapterError, MachineError, ModelError
from qlora.lock import Lock, Locked
from qlora.model.adapters import read_config
from qlora.model.load import build_skeleton, four_bit_of, four_bit_targets, generation_config_of
from qlora.model.nf4 import NESTED_BLOCK_SIZE, FourBit, dequantize, quantize
from qlora.model.shards import DTYPES, write_safetensors
from qlora.model.source import INDEX, Source
from qlora.model.untrusted import foreign

__all__ = ["SHARD_BYTES", "Merged", "Weights", "check_place", "dequantized", "write"]

Weights = Literal["original", "dequantized"]
SHARD_BYTES = 5 * 10**9  # of a shard, as transformers has it

_WEIGHTS_FILE = "adapter_model.safetensors"
_PROGRESS = "progress.json"
_PIECE = 1 << 24  # values that are in fp32 at a time: a few tensors of 64 MiB. A multiple of 64 * 256
_PREFIX = "base_model.model."  # of PEFT's names in a file
_RESIDUAL = ("pissa", "olora", "orthogonal", "mica")  # initialisations that look at the base, or change it


class Merged(Mapping[str, Any]):
    """A base's checkpoint with an adapter merged in: name -> what gives the tensor when sliced with `[...]`.

    config   the model's, untied where the adapter changed one of two tied weights
    places   name -> (dtype, shape)
    weights  which base the adapter is merged into

    Raises AdapterError where the adapter does not belong to this base or is more than can be merged, ModelError where
    the base is not whole.
    """

    def __init__(
        self,
        adapter: Path,
        source: Source,
        config: Config,
        weights: Weights,
        device: torch.device | None = None,
        beside: Merged | None = None,
    ) -> None:
        """
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
        self._changes = _Changes(adapter, model, self._parameters)
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
        return sum(_nbytes(place) for place in self.places.values())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the host. Those that had to be made with it are kept until they are asked for."""
        with self._lock, torch.no_grad():
            if name in self._held:
                return self._held.pop(name)
            made = self._group_of[name].make(self)
            wanted = made.pop(name)
            self._held.update(made)
            return wanted

    def identity(self) -> str:
        """SHA-256 of all that decides what is written."""
        digest = hashlib.sha256(self.source.fingerprint().encode())
        for name in ("adapter_config.json", _WEIGHTS_FILE):
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
            dense = dequantized(dense, self._four_bit, self.device).to(dense.dtype)
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

    def make(self, merged: Merged) -> dict[str, torch.Tensor]:
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

    def make(self, merged: Merged) -> dict[str, torch.Tensor]:
        dtype = merged._parameters[self.parameters[0]].dtype
        read = {name: merged._tensors[name][...].to(dtype) for name in self.names}
        if not any(map(merged.touches, self.parameters)):
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


class _Changes:
    """What an adapter does to each parameter of a model, by name."""

    def __init__(self, adapter: Path, model: PreTrainedModel, parameters: Mapping[str, torch.Tensor]) -> None:
        self._path = adapter / _WEIGHTS_FILE
        config = _mergeable(adapter)
        with foreign(f"{adapter}: does not fit this base", AdapterError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that what is tied or has no weights cannot be merged: here it can
            adapted = PeftModel(model, config, low_cpu_mem_usage=True)
            expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        unreadable = foreign(f"{self._path}: truncated or not a safetensors file", AdapterError)
        with unreadable, safe_open(self._path, framework="pt") as f:
            there = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 - no dict
        self._replaced = {_plain(name): name for name in there if _plain(name) in parameters}
        self._check(adapter, there, {name: tuple(t.shape) for name, t in expected.items()}, parameters)
        self._layers: dict[str, tuple[Any, str, str]] = {}  # parameter -> (layer, its path, the parameter's last name)
        inner: Any = adapted.base_model.model
        for path, layer in inner.named_modules():
            if isinstance(layer, LoraLayer):
                if isinstance(layer, MultiheadAttention):
                    raise AdapterError(f"{adapter}: {path} is a whole attention, which cannot be merged here")
                leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
                where = path.replace(".base_layer", "")
                self._layers[f"{where}.{leaf}"] = (layer, path, leaf)
                if layer.lora_bias.get("default"):
                    self._layers[f"{where}.bias"] = (layer, path, "bias")

    def __contains__(self, name: str) -> bool:
        return name in self._layers or name in self._replaced

    def keys(self) -> set[str]:
        """The parameters that it changes."""
        return self._layers.keys() | self._replaced.keys()

    def apply(self, name: str, dense: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A parameter after the merge, in the dtype that it has."""
        if name in self._replaced:
            with safe_open(self._path, framework="pt", backend="pread") as f:
                dense = f.get_tensor(self._replaced[name]).to(dense.dtype)
        if name not in self._layers:
            return dense
        layer, path, leaf = self._layers[name]
        with self._filled(layer, path, device) as base:
            try:
                return _merge(layer, base, leaf, dense, device)
            except ValueError as error:  # PEFT's: not finite
                raise AdapterError(f"{self._path}: {path}: {error}") from error

    @contextmanager
    def _filled(self, layer: Any, path: str, device: torch.device) -> Iterator[nn.Module]:
        """The layer with the adapter's weights in fp32; yields the module that it stands on."""
        names = [n for n, p in layer.named_parameters() if ".default" in n and not n.startswith("base_layer.")]
        empty = {name: layer.get_parameter(name) for name in names}
        with safe_open(self._path, framework="pt", backend="pread") as f:
            held = set(f.keys())
            for name in names:
                key = f"{_PREFIX}{path}.{name.replace('.default', '')}"
                key = key if key in held else key.removesuffix(".weight")  # DoRA's magnitudes
                _put(layer, name, nn.Parameter(f.get_tensor(key).to(device, torch.float32), requires_grad=False))
        base = layer.get_base_layer()
        kept = {n: p for n, p in base.named_parameters(recurse=False)}
        try:
            yield base
        finally:
            layer.merged_adapters.clear()
            layer._caches.clear()
            for name, parameter in empty.items():
                _put(layer, name, parameter)
            for name, parameter in kept.items():
                base._parameters[name] = parameter

    def _check(
        self, adapter: Path, there: Mapping[str, Any], expected: Mapping[str, Any], parameters: Mapping[str, Any]
    ) -> None:
        """Raise AdapterError where the file is not what the configuration makes of this base."""
        wrong = [f"{name} is missing" for name in sorted(expected.keys() - there.keys())]
        for name in sorted(there):
            place = expected.get(name)
            if place is None and name.startswith(_PREFIX) and _plain(name) in parameters:
                place = tuple(parameters[_plain(name)].shape)
            if place is None:
                wrong.append(f"{name} has no place in this base")
            elif place != there[name]:
                wrong.append(f"{name} is {list(there[name])}, this base has {list(place)}")
        if wrong:
            shown = "".join(f"\n  {line}" for line in wrong[:4]) + (f"\n  and {len(wrong) - 4} more" * (len(wrong) > 4))
            raise AdapterError(f"{adapter}: was trained on another base, or is not whole:{shown}")


def _mergeable(adapter: Path) -> LoraConfig:
    """The adapter's configuration, initialising nothing. Raises AdapterError where a merge could not be true to it."""
    config = read_config(adapter)
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(_RESIDUAL):
        raise AdapterError(
            f"{adapter}: started by `init_lora_weights: {start}`, from what its base's weights were; its merge is not"
            " supported\n  use the adapter unmerged, or convert it to plain LoRA with PEFT first"
        )
    if getattr(config, "trainable_token_indices", None):
        raise AdapterError(f"{adapter}: trains single tokens (`trainable_token_indices`), which is not merged here")
    return dataclasses.replace(config, init_lora_weights=False, lora_dropout=0.0)


def _plain(name: str) -> str:
    """The model's own name for a weight that an adapter's file has whole."""
    return name.removeprefix(_PREFIX).replace(".base_layer", "")


def _put(module: nn.Module, name: str, parameter: Any) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = parameter


def _merge(layer: Any, base: nn.Module, leaf: str, dense: torch.Tensor, device: torch.device) -> torch.Tensor:
    """PEFT's merge of one layer, in fp32. A linear layer's outputs do not know each other: they go in pieces."""
    outputs = rows = 1  # all in one piece
    inputs: int = layer.in_features
    axes: dict[str, int] = {}  # of the adapter's weights: where the outputs are
    if leaf == "bias" or (isinstance(layer, Linear) and not layer.fan_in_fan_out):
        outputs, rows = len(dense), max(_PIECE // inputs, 1)
        axes = {"lora_B.default.weight": 0, "lora_B.default.bias": 0, "lora_magnitude_vector.default.weight": 0}
    elif isinstance(layer, Embedding) and not layer.lora_variant:
        outputs, rows = dense.shape[0], max(_PIECE // dense.shape[1], 1)
        axes = {"lora_embedding_A.default": 1}
    bias = None if base._parameters.get("bias") is None else base.get_parameter("bias").shape
    whole = {name: (p, p.data) for name, p in layer.named_parameters() if name in axes}
    for first in range(0, outputs, rows):
        here = slice(first, first + rows) if rows < outputs else slice(None)
        for name, (parameter, data) in whole.items():
            parameter.data = data[here] if axes[name] == 0 else data[:, here]
        piece = dense[here].to(device, torch.float32, copy=True)
        if leaf == "bias":
            weight = torch.zeros(len(piece), inputs, device=device)
            if layer.fan_in_fan_out:
                weight = weight.t()
            given = {"weight": weight, "bias": piece}
        else:
            given = {leaf: piece}
            if bias is not None:
                given["bias"] = torch.zeros(bias, device=device)[here]
        for name, tensor in given.items():
            base._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        layer.merged_adapters.clear()
        layer.merge(safe_merge=False, adapter_names=["default"])
        merged = base.get_parameter(leaf).data
        if not torch.isfinite(merged).all():
            raise ValueError("not finite after the merge: the adapter is broken")
        dense[here] = merged.to(dense.device, dense.dtype)
    return dense


def dequantized(dense: torch.Tensor, four_bit: FourBit, device: torch.device) -> torch.Tensor:
    """A weight as training saw it: into four bits and back, on the host.

    Bit for bit that of `quantize` and `dequantize`. On the CPU bitsandbytes takes 16 bytes a value meanwhile, so there
    the blocks of a large weight are quantized in pieces, and their maxima together.
    """
    if device.type != "cpu" or dense.numel() <= _PIECE:
        return dequantize(quantize(dense.to(device), four_bit), dense.shape, four_bit).cpu()
    flat, out = dense.reshape(-1), torch.empty(dense.numel(), dtype=four_bit.compute_dtype)
    single = dataclasses.replace(four_bit, double_quant=False)
    parts = [quantize(piece, single) for piece in flat.split(_PIECE)]
    maxima = torch.cat([part["absmax"] for part in parts])
    if four_bit.double_quant:
        offset = maxima.mean()
        codes, nested = bnb.quantize_blockwise(maxima - offset, blocksize=NESTED_BLOCK_SIZE)
        maxima = bnb.dequantize_blockwise(codes, nested) + offset
    sizes = [len(part["absmax"]) for part in parts]
    for part, absmax, piece in zip(parts, maxima.split(sizes), out.split(_PIECE), strict=True):
        piece.copy_(dequantize({"packed": part["packed"], "absmax": absmax}, piece.shape, single).reshape(-1))
    return out.view(dense.shape)


# --- writing


def write(
    merged: Merged,
    out: Path,
    beside: Callable[[Path], None],
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Write the merged model to `out`, with its index and configuration, and a manifest of every file's SHA-256.

    beside       writes what else belongs there into the directory that it is given
    shard_bytes  most of a shard; a tensor that is larger has one for itself

    Whole shards of a merge that was cut short are kept. A merged model that is at `out` is replaced, anything else is
    not. Raises AdapterError, MachineError.
    """
    out = out.absolute()
    check_place(out)
    work = out.with_name(f".{out.name}.merging.unfinished")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with Lock(work):
            try:
                _write(merged, out, work, beside, shard_bytes, say)
            finally:
                if not (work / _PROGRESS).exists():  # what came to nothing leaves nothing
                    shutil.rmtree(work, ignore_errors=True)
    except Locked as error:
        raise MachineError(f"{out}: {error.holder} is merging there already") from error
    except OSError as error:
        advice = "whole shards are kept: with more room the same command goes on from them"
        raise durable.disk_error(out, error, merged.nbytes, advice) from error


def check_place(out: Path) -> None:
    """Raise AdapterError where something stands at `out` that `write` has not written."""
    ours = out.is_dir() and (not any(out.iterdir()) or (out / durable.MANIFEST).is_file())
    if os.path.lexists(out) and not ours:
        raise AdapterError(f"{out}: there is something else already; give another place with --out")


def _write(
    merged: Merged,
    out: Path,
    work: Path,
    beside: Callable[[Path], None],
    shard_bytes: int,
    say: Callable[[str], None],
) -> None:
    shards = _shards(merged, shard_bytes)
    identity = hashlib.sha256(json.dumps([merged.identity(), shards]).encode()).hexdigest()
    draft, done = _resume(work, identity)
    if done:
        say(f"{len(done)} of {len(shards)} shards are there from a merge that was cut short")
    needed = sum(_nbytes(merged.places[n]) for name, names in shards.items() if name not in done for n in names)
    needed += 64 << 20  # tokenizer and the like
    if (free := durable.free_disk_bytes(work)) < needed:
        raise MachineError(
            f"{out}: the merged model needs {durable.readable(needed)} of disk, {durable.readable(free)} are free\n"
            "  --out: a directory on a disk with more room"
        )
    for name, names in shards.items():
        if name not in done:
            with draft.writer(name) as writer:
                write_safetensors(writer, _Shard(merged, names))
            done[name] = draft.adopt()[name].model_dump()
            durable.replace_file(work / _PROGRESS, json.dumps({"identity": identity, "shards": done}).encode())
            say(f"shard {len(done)} of {len(shards)} is written")
    if len(shards) > 1:
        placed = {n: name for name, names in shards.items() for n in names}
        index = {"metadata": {"total_size": merged.nbytes}, "weight_map": dict(sorted(placed.items()))}
        draft.write(INDEX, json.dumps(index, indent=1).encode())
    merged.save_config(draft.path)
    beside(draft.path)
    draft.adopt()
    draft.seal()
    _put_in_place(draft.path, out)
    (work / _PROGRESS).unlink()


def _put_in_place(made: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old.unfinished")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)  # a directory replaces nothing
    os.rename(made, out)
    durable.sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


class _Shard(Mapping[str, Any]):
    """The tensors of one shard as `write_safetensors` takes them: what it asks of each before it writes is known."""

    def __init__(self, merged: Merged, names: Sequence[str]) -> None:
        self._merged, self._left = merged, list(names)

    def items(self) -> Any:
        # The layout is made of empty ones.
        places = self._merged.places
        return [(n, torch.empty(places[n][1], dtype=places[n][0], device="meta")) for n in self._left]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._merged.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._left)

    def __len__(self) -> int:
        return len(self._left)


def _shards(merged: Merged, shard_bytes: int) -> dict[str, list[str]]:
    """Which tensors go into which file, in the checkpoint's order. What is made together stays together."""
    shards: list[list[str]] = []
    size = 0
    for group in merged._groups:
        nbytes = sum(_nbytes(merged.places[name]) for name in group.names)
        if not shards or (size and size + nbytes > shard_bytes):
            shards.append([])
            size = 0
        shards[-1].extend(group.names)
        size += nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def _resume(work: Path, identity: str) -> tuple[durable.Draft, dict[str, Any]]:
    """Where to write, with the whole shards that an earlier merge of the same left there. All else of it goes."""
    made, shards = work / "model", {}
    try:
        progress = json.loads((work / _PROGRESS).read_bytes())
        if progress["identity"] == identity:
            shards = dict(progress["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or none that can be believed
    made.mkdir(exist_ok=True)
    while True:
        for path in made.iterdir():
            if path.name not in shards:
                path.unlink()
        draft = durable.Draft(made)
        found = {name: record.model_dump() for name, record in draft.adopt().items()}
        if found == shards:
            return draft, shards
        shards = {name: record for name, record in found.items() if shards[name] == record}


def _nbytes(place: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return place[0].itemsize * torch.Size(place[1]).numel()
