"""What an adapter does to each parameter of a model: PEFT's own merge, a piece of one parameter at a time.

PEFT owns the arithmetic. Its layers stand on the meta device, and each is filled from the adapter's file, given its
weight in fp32 a piece at a time, and emptied again.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, Linear, MultiheadAttention, ParamWrapper
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from qlora.errors import AdapterError
from qlora.model.adapters import read_config
from qlora.model.nf4 import NESTED_BLOCK_SIZE, FourBit, dequantize, quantize
from qlora.model.untrusted import foreign

__all__ = ["WEIGHTS_FILE", "Changes", "requantize"]

WEIGHTS_FILE = "adapter_model.safetensors"
_PIECE = 1 << 24  # values that are in fp32 at a time: a few tensors of 64 MiB. A multiple of 64 * 256
_PREFIX = "base_model.model."  # of PEFT's names in a file
_RESIDUAL = ("pissa", "olora", "orthogonal", "mica")  # initialisations that look at the base, or change it


class Changes:
    """What an adapter does to each parameter of a model, by name; without an adapter, nothing."""

    def __init__(self, adapter: Path | None, model: PreTrainedModel, parameters: Mapping[str, torch.Tensor]) -> None:
        self._layers: dict[str, tuple[Any, str, str]] = {}  # parameter -> (layer, its path, the parameter's last name)
        self._replaced: dict[str, str] = {}  # parameter -> its name in the file
        if adapter is None:
            return
        self._path = adapter / WEIGHTS_FILE
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
                held, first = f.get_slice(self._replaced[name]), 0
                for piece in dense.split(max(_PIECE // dense[0].numel(), 1)):
                    piece.copy_(held[first : first + len(piece)])
                    first += len(piece)
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


def requantize(dense: torch.Tensor, four_bit: FourBit, device: torch.device) -> torch.Tensor:
    """A weight on the host as training saw it: into four bits and back, in its own memory.

    Bit for bit that of `quantize` and `dequantize`. On the CPU bitsandbytes takes 16 bytes a value meanwhile, so there
    the blocks of a large weight are quantized in pieces, and their maxima together.
    """
    if device.type != "cpu" or dense.numel() <= _PIECE:
        return dense.copy_(dequantize(quantize(dense.to(device), four_bit), dense.shape, four_bit))
    dense = dense.contiguous()
    pieces, single = dense.view(-1).split(_PIECE), dataclasses.replace(four_bit, double_quant=False)
    parts = [quantize(piece, single) for piece in pieces]
    maxima = torch.cat([part["absmax"] for part in parts])
    if four_bit.double_quant:
        offset = maxima.mean()
        codes, nested = bnb.quantize_blockwise(maxima - offset, blocksize=NESTED_BLOCK_SIZE)
        maxima = bnb.dequantize_blockwise(codes, nested) + offset
    sizes = [len(part["absmax"]) for part in parts]
    for part, absmax, piece in zip(parts, maxima.split(sizes), pieces, strict=True):
        piece.copy_(dequantize({"packed": part["packed"], "absmax": absmax}, piece.shape, single).reshape(-1))
    return dense
