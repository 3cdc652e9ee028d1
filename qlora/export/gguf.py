"""GGUF: merged weights, or an adapter alone, as llama.cpp loads them.

What transformers' reader does to a GGUF file is undone here, tensor by tensor: its names, its layouts (the rotary
halves of llama's q and k, norms that are kept less one), its metadata. Every tensor is taken through that reader again
before it is written, and the finished file's configuration is read back: what does not return as it was is refused, so
no architecture is written that merely looks like a known one.

    write_gguf(merged, out, "f16")       16-bit safetensors -> a model
    write_gguf_lora(adapter, out, base)  A and B of each pair, for `--lora` beside the base's .gguf

A base that was a .gguf lends its metadata, tokenizer included. Otherwise the tokenizer comes from tokenizer.json, where
llama.cpp knows how it cuts words: that is code there, chosen by a name, so an unknown one is refused.

Sources: GGUF specification, ggml/docs/gguf.md; adapters as read by llama.cpp, src/llama-adapter.cpp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import (
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    TokenType,
    quantize,
)
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora import durable
from qlora.config import ModelConfig
from qlora.errors import AdapterError, ModelError
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
# Model types of transformers -> llama.cpp's: those that both were seen to compute alike.
_ARCHITECTURES = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "gemma2")},
    **{"mistral": "llama", "gemma3_text": "gemma3"},
}
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}  # there llama.cpp scales attention by the mean width of a head
_LOCAL_THETA = 10_000.0  # of Gemma 3's layers with a window
_ADVICE = "give a directory on a disk with more room"
# What a configuration has beyond what the model computes, and what `_metadata` writes though transformers reads it not.
_NO_MATTER = {
    *(
        "_name_or_path",
        "_model_name_or_path",
        "architectures",
        "dtype",
        "transformers_version",
        "model_type",
        "use_cache",
        "initializer_range",
    ),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "pretraining_tp"),
    *("attention_dropout", "torch_dtype", "id2label", "label2id", "rms_norm_eps", "max_position_embeddings"),
    *("rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "head_dim"),
    *("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "sliding_window_pattern"),
    *("_sliding_window_pattern", "cache_implementation"),
}


@dataclass(frozen=True, slots=True)
class _Architecture:
    """A model type as llama.cpp calls it, with transformers' way of reading it.

    keys   metadata key, without the architecture -> attribute of the configuration
    names  tensor name in a GGUF file -> in transformers
    """

    name: str
    config: PreTrainedConfig
    keys: Mapping[str, str | None]
    names: Mapping[str, str]
    processor: TensorProcessor

    @classmethod
    def of(cls, config: PreTrainedConfig) -> _Architecture:
        """Raises ModelError for what the format, or transformers' reader of it, does not know."""
        name = _ARCHITECTURES.get(config.model_type)
        if name is None:
            raise ModelError(
                f"architecture `{config.model_type}` cannot be written as GGUF; {', '.join(_ARCHITECTURES)} can\n"
                "  export `merged`: llama.cpp's own convert_hf_to_gguf.py reads that, and knows many more"
            )
        processor = TENSOR_PROCESSORS.get(name, TensorProcessor)(config.to_dict())
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        return cls(
            name, config, GGUF_CONFIG_MAPPING[name], get_gguf_hf_weights_map(skeleton, processor, name), processor
        )

    def written(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """A tensor in transformers' layout, float32, as it lies in a GGUF file under `name`."""
        found = _undone(self.name, name, tensor, self.config)
        read = self.processor.process(
            weights=found, name=name, tensor_key_mapping=self.names, parsed_parameters={"tensors": {}}
        )
        same = read.name == name and read.weights.shape == tensor.shape
        if not same or not (np.array_equal(read.weights, tensor) or np.allclose(read.weights, tensor, rtol=1e-6)):
            raise ModelError(
                f"architecture `{self.name}` cannot be written as GGUF: the layout of {self.names[name]} is not known"
            )
        return found


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
    architecture = _Architecture.of(config)
    tensors = _placed(architecture, source)
    vocabulary = architecture.config.vocab_size
    size = sum(path.stat().st_size for path in source.files)
    with _new_file(out, architecture.name, size) as (writer, path):
        if base_gguf is None:
            writer.add_type("model")
            writer.add_name(merged.resolve().name)
            for key, value in _metadata(architecture).items():
                _add(writer, key, value)
            for key, value in _tokenizer_metadata(merged, tokenizer, vocabulary).items():
                _add(writer, key, value)
            extra = _rope_factors(config)
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
            _check_config(config, path)


def write_gguf_lora(adapter: Path, out: Path, base: Source) -> None:
    """Write the adapter in a directory, PEFT's format, as one .gguf file that llama.cpp puts on the base's .gguf.

    llama.cpp scales every pair by one alpha over its rank; where pairs are scaled otherwise (rsLoRA, alpha or rank
    patterns) B is multiplied by what is left, so that the product stays what it was.

    Raises AdapterError for what llama.cpp's adapters cannot carry (DoRA, biases, whole modules or tokens beside
    the pairs, embeddings), with the part; ModelError for an architecture that the format cannot carry.
    """
    config = adapters.read_config(adapter)
    _refuse_beyond_lora(adapter, config)
    architecture = _Architecture.of(base.config())
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


def _placed(architecture: _Architecture, source: Source) -> dict[str, _Stored]:
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


def _undone(architecture: str, name: str, tensor: np.ndarray, config: PreTrainedConfig) -> np.ndarray:
    """Undo what transformers' reader does to a tensor. What is not undone here comes out when it is read again."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))
    if architecture in ("gemma2", "gemma3", "nemotron") and "norm.weight" in name:
        return tensor + 1
    return tensor


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


def _metadata(architecture: _Architecture) -> dict[str, Any]:
    """What the model computes with, by its GGUF keys: transformers' own table, and what llama.cpp reads beside it."""
    config, name = architecture.config, architecture.name
    rope: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    local = rope.get("sliding_attention", {}).get("rope_theta", _LOCAL_THETA)
    rope = rope.get("full_attention", rope)
    scale = getattr(config, "query_pre_attn_scalar", None)
    mean = config.hidden_size // config.num_attention_heads
    is_27b = config.num_hidden_layers == _LAYERS_OF_27B.get(name)
    for key, value, always in (
        ("query_pre_attn_scalar", scale, scale and (mean if is_27b else config.head_dim)),
        ("rope_theta of layers with a window", local, _LOCAL_THETA),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
    ):
        if value != always:
            raise _other(config, key, value, always)
    found: dict[str, Any] = {}
    for key, attribute in architecture.keys.items():
        value = rope.get(attribute) if attribute == "rope_theta" else attribute and getattr(config, attribute, None)
        if isinstance(value, (int, float)):
            found[f"{name}.{key}"] = float(value) if "epsilon" in key or "freq_base" in key else value
    window = getattr(config, "sliding_window", None) if name in ("llama", "qwen2", "qwen3", "phi3") else None
    windowed = window and getattr(config, "use_sliding_window", True)
    if windowed and window < config.max_position_embeddings:
        found[f"{name}.context_length"] = window  # llama.cpp has no window here; up to its length there is none to see
    if dimension := getattr(config, "head_dim", None):
        found |= {f"{name}.attention.key_length": dimension, f"{name}.attention.value_length": dimension}
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if value := getattr(config, key, None):
            found[f"{name}.{key}"] = float(value)
    return found | _rope_scaling(name, rope)


def _rope_scaling(name: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):  # the second is a tensor: `_rope_factors`
        return {}
    if kind not in ("linear", "yarn"):
        raise ModelError(
            f"architecture `{name}` cannot be written as GGUF: its rotary scaling `{kind}` is not supported"
        )
    found = {f"{name}.rope.scaling.type": kind, f"{name}.rope.scaling.factor": float(rope["factor"])}
    if original := rope.get("original_max_position_embeddings"):
        found[f"{name}.rope.scaling.original_context_length"] = int(original)
    return found


def _rope_factors(config: PreTrainedConfig) -> dict[str, np.ndarray]:
    """Llama 3.1's scaling is a divisor for each frequency, which llama.cpp reads as a tensor."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(scaled.numel(), dtype=torch.float32) / scaled.numel()
    plain = 1.0 / float(rope["rope_theta"]) ** exponents
    return {"rope_freqs.weight": (plain / scaled).numpy().astype(np.float32)}


def _copied(
    writer: GGUFWriter, base: Path, architecture: _Architecture, ours: set[str], vocabulary: int
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


# How llama.cpp calls a way to cut words. Written as (expression, or None for GPT-2's own; digits one by one).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_CUTS = {
    (None, False): "gpt-2",
    (None, True): "smollm",
    (_LLAMA3, False): "llama-bpe",
    (_LLAMA3.replace("{1,3}", ""), False): "qwen2",
}


def _tokenizer_metadata(merged: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> dict[str, Any]:
    """tokenizer.json as llama.cpp's metadata. vocabulary: rows of the embedding. Raises ModelError."""
    if not tokenizer.is_fast:
        raise ModelError(f"{merged}: its tokenizer has no tokenizer.json, so it cannot be written as GGUF")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    model, added = spec["model"], {entry["id"]: entry for entry in spec["added_tokens"]}
    if model["type"] != "BPE":
        raise ModelError(f"{merged}: its tokenizer ({model['type']}) cannot be written as GGUF; only BPE can")
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= vocabulary:
        raise ModelError(f"{merged}: token {max(ids.values())} has no row in the embedding, which has {vocabulary:,}")
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    types = [TokenType.UNUSED] * vocabulary
    for token, number in ids.items():
        special = number in added and added[number]["special"]
        kind = TokenType.CONTROL if special else TokenType.USER_DEFINED if number in added else TokenType.NORMAL
        tokens[number], types[number] = token, kind
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    found: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if model["byte_fallback"]:
        found |= _sentencepiece(spec, model, merges, tokens, types)
    else:
        found |= {"model": "gpt2", "pre": _cut(merged, spec), "merges": [" ".join(merge) for merge in merges]}
    bare, dressed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    bos: Any = tokenizer.bos_token_id
    found["add_bos_token"] = bos is not None and dressed[:1] == [bos] != bare[:1]  # type: ignore[index]
    found["add_eos_token"] = False
    for key, name in (("bos", "bos"), ("unknown", "unk"), ("padding", "pad")):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            found[f"{key}_token_id"] = int(number)
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def _sentencepiece(
    spec: Mapping[str, Any],
    model: Mapping[str, Any],
    merges: list[list[str]],
    tokens: list[str],
    types: list[TokenType],
) -> dict[str, Any]:
    """Of a tokenizer that was SentencePiece once: llama.cpp joins what gives the highest score, tokenizers by rank."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault("".join(pair), number)
    for number, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = TokenType.BYTE
        elif token == model.get("unk_token"):
            types[number] = TokenType.UNKNOWN
    prefixed = '"Prepend"' in json.dumps(spec["normalizer"])
    cut = spec["pre_tokenizer"] or {}
    if cut.get("type") == "Metaspace":
        prefixed = cut.get("prepend_scheme", "always") != "never"
    scores = [-float(rank.get(token, 0)) for token in tokens]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefixed}


def _cut(merged: Path, spec: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts a text into words before it joins bytes."""
    steps = spec["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    digits = any(step.get("type") == "Digits" and step.get("individual_digits") for step in steps)
    splits = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    last = steps[-1]
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    own = {"ByteLevel", "Digits", "Split"} >= {step.get("type") for step in steps} and len(splits) < 2
    if plain and own and bool(splits) != bool(last.get("use_regex", True)):
        name = _CUTS.get((splits[0] if splits else None, digits))
        if name and bool(spec["model"].get("ignore_merges")) == (name == "llama-bpe"):
            return name
    raise ModelError(
        f"{merged}: its tokenizer cuts words in a way that has no name in llama.cpp, so it cannot be written as GGUF: "
        f"{json.dumps(spec['pre_tokenizer'])[:300]}\n  known are those of GPT-2, SmolLM, Llama 3 and Qwen 2 and 3"
    )


def _check_config(config: PreTrainedConfig, path: Path) -> None:
    """Read the file's configuration back. Raises ModelError for an attribute that it could not carry."""
    with foreign(f"{path.name}: transformers cannot read it back"):
        read = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    for key, value in config.to_dict().items():
        if key not in _NO_MATTER and key in read and read[key] != value:
            raise _other(config, key, value, read[key])


def _other(config: PreTrainedConfig, key: str, value: Any, always: Any) -> ModelError:
    return ModelError(
        f"architecture `{config.model_type}` with {key}={value!r} cannot be written as GGUF: "
        f"there it is always {always!r}"
    )


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
            f"{adapter}: has {' and '.join(found)}, which llama.cpp's adapters cannot carry; export `gguf`, "
            "where it is merged"
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
        raise durable.disk_error(out, error, nbytes, _ADVICE) from error
    finally:
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
