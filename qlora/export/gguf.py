"""GGUF: merged weights, or an adapter alone, as llama.cpp loads them.

What transformers' reader does to a GGUF file is undone here, tensor by tensor: its names, its layouts (the rotary
halves of llama's q and k, norms that are kept less one), its metadata (`gguf_model`). Every tensor is taken through
that reader again before it is written, and the finished file's configuration is read back: what does not return as it
was is refused, so no architecture is written that merely looks like a known one.

    write_gguf(merged, out, "f16")       16-bit safetensors -> a model
    write_gguf_lora(adapter, out, base)  A and B of each pair, for `--lora` beside the base's .gguf

A base that was a .gguf lends its metadata, tokenizer included. Otherwise the tokenizer comes from tokenizer.json, where
llama.cpp knows how it cuts words: that is code there, chosen by a name, so an unknown one is refused.

Sources: GGUF specification, ggml/docs/gguf.md; adapters as read by llama.cpp, src/llama-adapter.cpp.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, quantize
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from qlora import durable
from qlora.config import ModelConfig
from qlora.errors import AdapterError, ModelError
from qlora.export.gguf_model import Architecture, check_config, metadata, rope_factors, tokenizer_metadata
from qlora.model import adapters
from qlora.model.gguf_header import check_gguf
from qlora.model.source import SafetensorsTensor, Source, open_source, read_tokenizer
from qlora.model.untrusted import foreign

Kind = Literal["f16", "bf16", "q8_0"]

_TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_BLOCK = 32  # columns of a Q8_0 block
_ADVICE = "give a directory on a disk with more room"


def write_gguf(
    merged: Path, out: Path, kind: Kind, *, base_gguf: Path | None = None, eos_token_id: int | None = None
) -> None:
    """Write a directory with a whole model (safetensors, config.json, tokenizer) as one .gguf file.

    kind          of the matrices; norms and biases are float32. Q8_0 is 8.5 bits a weight
    base_gguf     the .gguf file that the base was: its metadata is taken, tokenizer included; the template and the end
                  are those of `merged`
    eos_token_id  the token that ends an answer; None is the tokenizer's EOS

    One tensor is in memory at a time. Raises ModelError for what the format cannot carry, which it names, or where a
    file is not whole; MachineError where `out` cannot be written.
    """
    source = open_source(ModelConfig(model_name_or_path=str(merged)))
    tokenizer = read_tokenizer(merged)
    end: Any = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    config = source.config()
    architecture = Architecture.of(config)
    tensors = _placed(architecture, source)
    vocabulary = architecture.config.vocab_size
    size = sum(path.stat().st_size for path in source.files)
    with _new_file(out, architecture.name, size) as (writer, path):
        if base_gguf is None:
            writer.add_type("model")
            writer.add_name(merged.resolve().name)
            for key, value in metadata(architecture).items():
                _add(writer, key, value)
            for key, value in tokenizer_metadata(merged, tokenizer, vocabulary).items():
                _add(writer, key, value)
            extra = rope_factors(config)
        else:
            extra = _copied(writer, base_gguf, architecture, set(tensors), vocabulary)
        if end is not None:
            _add(writer, "tokenizer.ggml.eos_token_id", int(end))
        if isinstance(tokenizer.chat_template, str):
            _add(writer, "tokenizer.chat_template", tokenizer.chat_template)
        writer.add_file_type(_TYPES[kind][1])
        writer.add_quantization_version(2)
        shapes = {name: tensors[name].shape() for name in tensors}
        for name, shape in shapes.items():
            _declare(writer, name, shape, _type_of(shape, kind))
        for name, array in extra.items():
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
        _write_header(writer, path)
        for name, shape in shapes.items():
            tensor = architecture.written(name, tensors[name][:].float().numpy())
            writer.write_tensor_data(_encoded(tensor, _type_of(shape, kind), name))
        for array in extra.values():
            writer.write_tensor_data(array)
        writer.close()
        if base_gguf is None:
            check_config(config, path)


def write_gguf_lora(adapter: Path, out: Path, base: Source) -> None:
    """Write the adapter in a directory, PEFT's format, as one .gguf file that llama.cpp puts on the base's .gguf.

    llama.cpp scales every pair by one alpha over its rank; where pairs are scaled otherwise (rsLoRA, alpha or rank
    patterns) B is multiplied by what is left, so that the product stays what it was.

    Raises AdapterError for what llama.cpp's adapters cannot carry (DoRA, biases, whole modules or tokens beside
    the pairs, embeddings), with the part; ModelError for an architecture that the format cannot carry.
    """
    config = adapters.read_config(adapter)
    _refuse_beyond_lora(adapter, config)
    architecture = Architecture.of(base.config())
    names = {hf: name for name, hf in architecture.names.items()}
    weights = adapter / "adapter_model.safetensors"
    pairs: dict[str, dict[str, SafetensorsTensor]] = {}
    with foreign(f"{weights}: truncated or not a safetensors file", AdapterError), safe_open(weights, "pt") as f:
        for key in f.keys():  # noqa: SIM118 - no dict
            module, found, part = key.removeprefix("base_model.model.").partition(".lora_")
            name = names.get(f"{module}.weight")
            if name == "output.weight" and architecture.config.tie_word_embeddings:
                name = None  # the base's file has no such tensor
            if not found or part not in ("A.weight", "B.weight") or name is None:
                raise AdapterError(
                    f"{adapter}: {key} is not what llama.cpp's adapters can carry; export `merged` or `gguf`"
                )
            pairs.setdefault(name, {})[part[0]] = SafetensorsTensor(weights, key)
    arrays: dict[str, np.ndarray] = {}
    scaled: dict[str, float] = {}
    for name, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise AdapterError(f"{adapter}: {architecture.names[name]} has half a pair only")
        a, b = (pair[part][:].float().numpy() for part in "AB")
        if a.shape[0] != b.shape[1]:
            raise AdapterError(f"{adapter}: A {a.shape} and B {b.shape} of {architecture.names[name]} do not fit")
        with foreign(f"{adapter}: B of {architecture.names[name]} does not fit the base", AdapterError):
            arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"] = a, architecture.written(name, b)
        scaled[name] = _scaling(config, architecture.names[name].removesuffix(".weight"), a.shape[0]) * a.shape[0]
    if not arrays:
        raise AdapterError(f"{adapter}: has no pair of LoRA matrices")
    alpha = next(iter(scaled.values()))  # llama.cpp: alpha / rank
    for name, wanted in scaled.items():
        if wanted != alpha:
            arrays[f"{name}.lora_b"] = arrays[f"{name}.lora_b"] * np.float32(wanted / alpha)
    size = sum(array.nbytes for array in arrays.values())
    with _new_file(out, architecture.name, size) as (writer, path):
        writer.add_type("adapter")
        writer.add_name(adapter.resolve().name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, array in arrays.items():
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
        _write_header(writer, path)
        for array in arrays.values():
            writer.write_tensor_data(np.ascontiguousarray(array))
        writer.close()


# ---- tensors


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file, with its shape known before it is read."""

    tensor: SafetensorsTensor

    def shape(self) -> tuple[int, ...]:
        with safe_open(self.tensor.path, framework="pt") as f:
            return tuple(f.get_slice(self.tensor.name).get_shape())

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index]


def _placed(architecture: Architecture, source: Source) -> dict[str, _Stored]:
    """GGUF name -> tensor, in the order of the layers. Every tensor of the model has a place, and every place one."""
    held: dict[str, SafetensorsTensor] = {}
    for path in source.files:
        with safe_open(path, framework="pt") as f:
            held.update({name: SafetensorsTensor(path, name) for name in f.keys()})  # noqa: SIM118 - no dict
    tied = bool(architecture.config.tie_word_embeddings)
    wanted = {name: hf for name, hf in architecture.names.items() if not (tied and name == "output.weight")}
    if lost := sorted(set(wanted.values()) - set(held)):
        raise ModelError(f"{source.name}: {len(lost)} tensors are missing, {lost[0]} first")
    left = set(held) - set(architecture.names.values())
    if left := sorted(name for name in left if not name.endswith("rotary_emb.inv_freq")):
        raise ModelError(
            f"{source.name}: architecture `{architecture.name}` has no place in GGUF for {len(left)} tensors, "
            f"{left[0]} first"
        )
    return {name: _Stored(held[hf]) for name, hf in wanted.items()}


def _type_of(shape: tuple[int, ...], kind: Kind) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    return _TYPES[kind][0]


def _declare(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    row = {GGMLQuantizationType.Q8_0: shape[-1] // _BLOCK * (_BLOCK + 2), GGMLQuantizationType.BF16: 2 * shape[-1]}
    if kind in row:  # as bytes
        packed = (*shape[:-1], row[kind])
        writer.add_tensor_info(name, packed, np.dtype(np.uint8), math.prod(packed), kind)
        return
    dtype = np.dtype(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
    writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize)


def _encoded(tensor: np.ndarray, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    if kind == GGMLQuantizationType.F16 and np.abs(tensor).max(initial=0) > np.finfo(np.float16).max:
        raise ModelError(f"{name}: has values beyond what F16 can hold; write bf16")
    return np.ascontiguousarray(quantize(np.ascontiguousarray(tensor, np.float32), kind))


# ---- metadata


def _copied(
    writer: GGUFWriter, base: Path, architecture: Architecture, ours: set[str], vocabulary: int
) -> dict[str, np.ndarray]:
    """Take over a GGUF file's metadata; returns the tensors that it has beside the model's (factors of frequencies)."""
    check_gguf(base)
    with foreign(f"{base}: truncated, or not a GGUF file"):
        reader = GGUFReader(base)
    fields = reader.fields
    if (name := str(fields["general.architecture"].contents())) != architecture.name:
        raise ModelError(f"{base}: its architecture is `{name}`, that of the merged model `{architecture.name}`")
    if (held := len(fields["tokenizer.ggml.tokens"].data)) != vocabulary:
        raise ModelError(f"{base}: its tokenizer has {held:,} tokens, the merged model {vocabulary:,}")
    for key, field in fields.items():
        if key.startswith("GGUF.") or key in (
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
        ):
            continue
        sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        if sub is None or len(field.data):  # the writer takes no empty array
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    known = set(architecture.names) | ours
    return {tensor.name: np.array(tensor.data) for tensor in reader.tensors if tensor.name not in known}


# ---- adapters


def _refuse_beyond_lora(adapter: Path, config: LoraConfig) -> None:
    """What llama.cpp would leave out in silence, or not load."""
    beyond = {
        "DoRA (use_dora)": config.use_dora,
        "whole modules (modules_to_save)": config.modules_to_save,
        "trained tokens (trainable_token_indices)": config.trainable_token_indices,
        "biases (bias, lora_bias)": config.bias != "none" or config.lora_bias,
    }
    if found := [name for name, there in beyond.items() if there]:
        raise AdapterError(
            f"{adapter}: has {' and '.join(found)}, which llama.cpp's adapters cannot carry\n"
            "  export `gguf`, where it is merged"
        )


def _scaling(config: LoraConfig, module: str, rank: int) -> float:
    """PEFT's factor of B A for a module."""
    pattern = config.alpha_pattern or {}
    alpha = float(pattern.get(get_pattern_key(list(pattern), module), config.lora_alpha))
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


# ---- the file


@contextmanager
def _new_file(out: Path, architecture: str, nbytes: int) -> Iterator[tuple[GGUFWriter, Path]]:
    """A writer, and where it writes meanwhile; the file is at `out`, whole, when the context ends, and not before."""
    writer = GGUFWriter(None, architecture)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with durable.new_files(out.parent, out.name) as draft:
            yield writer, draft.path / out.name
    except OSError as error:
        if error.errno is None:  # NumPy's: "2048 requested and 144 written"
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise durable.disk_error(out, error, nbytes, _ADVICE) from error
    finally:
        with suppress(OSError):  # what is still to be flushed to a full disk
            writer.close()


def _write_header(writer: GGUFWriter, path: Path) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Set a value of metadata, in place of one that is there."""
    held = writer.kv_data[0]
    held.pop(key, None)
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
