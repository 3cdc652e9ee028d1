"""A model as GGUF names it: its architecture, what it computes with, its tokenizer.

Tables and readers are transformers' own, taken the other way round. What a GGUF file cannot say of a model is refused,
by name: a file that merely looks like a known architecture would answer nonsense in silence.

Sources: GGUF specification, ggml/docs/gguf.md; llama.cpp, src/llama-model.cpp and src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import TokenType
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora.errors import ModelError
from qlora.model.untrusted import foreign

# Model types of transformers -> llama.cpp's: those that both were seen to compute alike.
_ARCHITECTURES = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "gemma2")},
    **{"mistral": "llama", "gemma3_text": "gemma3"},
}
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}  # there llama.cpp scales attention by the mean width of a head
_LOCAL_THETA = 10_000.0  # of Gemma 3's layers with a window
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
class Architecture:
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
    def of(cls, config: PreTrainedConfig) -> Architecture:
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


def _undone(architecture: str, name: str, tensor: np.ndarray, config: PreTrainedConfig) -> np.ndarray:
    """Undo what transformers' reader does to a tensor. What is not undone here comes out when it is read again."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))
    if architecture in ("gemma2", "gemma3", "nemotron") and "norm.weight" in name:
        return tensor + 1
    return tensor


def metadata(architecture: Architecture) -> dict[str, Any]:
    """What the model computes with, by its GGUF keys: transformers' own table, and what llama.cpp reads beside it.

    Raises ModelError for a value that llama.cpp cannot be told.
    """
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
    if kind in ("default", "llama3"):  # the second is a tensor: `rope_factors`
        return {}
    if kind not in ("linear", "yarn"):
        raise ModelError(
            f"architecture `{name}` cannot be written as GGUF: its rotary scaling `{kind}` is not supported"
        )
    found = {f"{name}.rope.scaling.type": kind, f"{name}.rope.scaling.factor": float(rope["factor"])}
    if original := rope.get("original_max_position_embeddings"):
        found[f"{name}.rope.scaling.original_context_length"] = int(original)
    return found


def rope_factors(config: PreTrainedConfig) -> dict[str, np.ndarray]:
    """Llama 3.1's scaling is a divisor for each frequency, which llama.cpp reads as a tensor."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(scaled.numel(), dtype=torch.float32) / scaled.numel()
    plain = 1.0 / float(rope["rope_theta"]) ** exponents
    return {"rope_freqs.weight": (plain / scaled).numpy().astype(np.float32)}


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


def tokenizer_metadata(merged: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> dict[str, Any]:
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


def check_config(config: PreTrainedConfig, path: Path) -> None:
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
