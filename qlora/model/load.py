"""A base model, quantized as it streams in.

transformers builds the model, renames and merges a checkpoint's tensors and puts them where they belong. We come in at
its seam for quantizers: each weight that is to be four-bit is quantized when it arrives, and its 16-bit form dropped.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora.config import Config, QuantizationConfig
from qlora.errors import CacheError, MachineError, ModelError
from qlora.machine import give_back_memory
from qlora.model.cache import CacheBuilder, cache_home, open_cache
from qlora.model.nf4 import FourBit, four_bit_weights, install
from qlora.model.source import Source
from qlora.model.store import Store, groups_of, tiers_of
from qlora.model.untrusted import check_implementation, foreign, read_json

METHOD = "qlora_streaming"  # our name among transformers' quantization methods


# What of a generation_config.json is taken. Its other keys choose a way to generate, some of them by downloaded code.
GENERATION = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "max_length", "max_new_tokens"),
)

DENSE = "dense"  # the cache's shard of everything that is not in four bits


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base model.

    parameters         how many it has
    four_bit_share     which part of them is in 4 bits, 0..1
    nbytes             bytes of all its weights at rest
    seconds            that loading took
    cached             whether it came from the NF4 cache
    """

    model: PreTrainedModel
    source: Source
    parameters: int
    four_bit_share: float
    nbytes: int
    seconds: float
    cached: bool


def load_base(
    config: Config, source: Source, device: torch.device, say: Callable[[str], None] = lambda text: None
) -> Base:
    """Load the recipe's base model: NF4 under `method: qlora`, each layer in the tier that `memory` gives it, all else
    in `model.dtype` on `device`.

    It comes from the NF4 cache where that has it, and is written there where not. Host memory above what stays is one
    tensor. Frozen except under `method: full`.

    say  is told in a line why a cache that is there is of no use

    Raises ModelError, and MachineError before anything is loaded.
    """
    started = time.perf_counter()
    skeleton = build_skeleton(_config(source, config), config, source.name)
    _check_size(source, skeleton)
    streaming, cached = StreamingConfig(), False
    if config.method == "qlora" and (targets := four_bit_targets(skeleton)):
        four_bit = four_bit_of(config.quantization)
        groups = groups_of(skeleton, targets)
        streaming.store = Store(groups, tiers_of(groups, config.memory), four_bit, device)
        model, cached = _through_cache(source, skeleton, streaming, streaming.store, config, device, say)
    else:
        model = _materialize(source, skeleton, source.tensors(skeleton), streaming, device)
    give_back_memory(device)  # what each weight took on its way through
    model.requires_grad_(config.method == "full")
    quantized = four_bit_weights(model)
    in_four_bit = sum(w.shape.numel() for w in quantized)
    dense = [p for p in model.parameters() if p.numel()]
    parameters = in_four_bit + sum(p.numel() for p in dense)
    nbytes = sum(w.nbytes for w in quantized) + sum(p.numel() * p.element_size() for p in dense)
    seconds = time.perf_counter() - started
    return Base(model, source, parameters, in_four_bit / parameters, nbytes, seconds, cached)


def _through_cache(
    source: Source,
    skeleton: PreTrainedModel,
    streaming: StreamingConfig,
    store: Store,
    config: Config,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[PreTrainedModel, bool]:
    """The model in four bits, and whether it came from the cache. What is not there yet is there afterwards."""
    home = cache_home(config.memory.nf4_cache_dir)
    if home is None:
        if "file" in store.tiers.values():
            raise ModelError("memory: layers on file are read from the NF4 cache, but memory.nf4_cache_dir is null")
        return _materialize(source, skeleton, source.tensors(skeleton), streaming, device), False
    identity = {"double_quant": store.four_bit.double_quant, "quant_type": store.four_bit.quant_type}
    if cache := open_cache(home, source, identity, skeleton.dtype, say, store.layouts):
        try:
            dense = cache.tensors(DENSE)
            store.take(cache)
        except CacheError as error:
            say(f"{error}\n  the cache is built again")
            cache.discard()
        else:
            tensors = dense | dict.fromkeys(store.names, _IN_STORE)
            return _materialize(source, skeleton, tensors, streaming, device), True
    with CacheBuilder(home, source, identity, skeleton.dtype, store.layouts) as builder:
        store.builder = builder
        model = _materialize(source, skeleton, source.tensors(skeleton), streaming, device)
        builder.add(DENSE, _dense_tensors(model))
        store.open_files(builder.commit())
    return model, False


def _dense_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a state dict has beside the four-bit weights; of tied tensors the first."""
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel():  # four-bit weights leave a placeholder of no elements
            tensors.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(tensors.values())


class _InStore:
    """Stands in a state dict for a weight that the store has already."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.empty(0)


_IN_STORE = _InStore()


def _config(source: Source, config: Config) -> PreTrainedConfig:
    model_config = source.config(config.model.trust_remote_code)
    # As transformers does for checkpoints that are quantized already; ours quantizes what is not.
    if getattr(model_config, "quantization_config", None) is not None and source.gguf is None:
        raise ModelError(
            f"{source.name}: is quantized already; give the 16-bit checkpoint, it is quantized as it streams in"
        )
    return model_config


def _check_size(source: Source, skeleton: PreTrainedModel) -> None:
    """Raise ModelError where the configuration describes far more than the files hold, before any of it is made."""
    described = sum(t.numel() for t in (*skeleton.parameters(), *skeleton.buffers()))
    nbytes = sum(path.stat().st_size for path in source.files)
    # A value takes a byte at least, in the smallest of GGUF's formats a fifth of one. Some tables are computed.
    if described > nbytes * (8 if source.gguf else 1) + 2**24:
        raise ModelError(
            f"{source.name}: its configuration describes {described:,} values, its weight files have {nbytes:,} bytes"
        )


def _materialize(
    source: Source,
    skeleton: PreTrainedModel,
    tensors: Mapping[str, Any],
    streaming: StreamingConfig,
    device: torch.device,
) -> PreTrainedModel:
    """The model with its weights. tensors: name -> what gives the tensor when sliced."""
    try:
        model, info = cast(Any, type(skeleton)).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=tensors,
            dtype=skeleton.dtype,
            attn_implementation=skeleton.config._attn_implementation,
            device_map={"": device},
            quantization_config=streaming,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"{source.name}: its weights do not fit on {device}: {str(error).split('. ')[0]}\n"
            "  fewer on it: memory.layers_on_device, memory.embeddings: host"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{source.name}: its weights do not fit its configuration: {error}") from error
    kinds = ("missing_keys", "mismatched_keys", "conversion_errors", "error_msgs")
    wrong = streaming.misfits + [f"{what}: {key}" for what in kinds for key in sorted(info.get(what) or (), key=str)]
    if wrong:
        shown = "".join(f"\n  {line}" for line in wrong[:4]) + (f"\n  and {len(wrong) - 4} more" if wrong[4:] else "")
        raise ModelError(f"{source.name}: its weights do not fit its configuration:{shown}")
    model.config.name_or_path = model.name_or_path = source.name
    model.generation_config = generation_config_of(source, model)
    return model


def build_skeleton(model_config: PreTrainedConfig, config: Config, name: str) -> PreTrainedModel:
    """The recipe's model without weights, on the meta device. name: for people. Raises ModelError."""

    def build(attention: str) -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                model_config,
                dtype=getattr(torch, config.model.dtype),
                attn_implementation=attention,
                trust_remote_code=config.model.trust_remote_code,
            )

    attention = config.model.attn_implementation
    check_implementation(attention, config.model.trust_remote_code)
    with foreign(f"{name}: not a decoder that transformers can build"):
        try:
            return build(attention)
        except ValueError as error:
            if attention != "sdpa" or "attn_implementation" not in str(error):
                raise
            warnings.warn(f"{name}: has no `sdpa` attention; `eager` is used", stacklevel=2)
            return build("eager")


def generation_config_of(source: Source, model: PreTrainedModel) -> GenerationConfig:
    path = source.directory / "generation_config.json"
    with foreign(f"{path}: transformers cannot read it"):
        if source.gguf is None and path.is_file():
            facts = read_json(path)
            return GenerationConfig(**{key: facts[key] for key in GENERATION if key in facts})
        return GenerationConfig.from_model_config(model.config)


class StreamingConfig(QuantizationConfigMixin):
    """What `StreamingQuantizer` is told through `from_pretrained`, and what it answers.

    store    takes the weights that are to be in four bits; None keeps every weight as it is
    misfits  weights that came in another shape than the model has
    """

    def __init__(self, **_: Any) -> None:
        self.quant_method = cast(Any, METHOD)  # transformers' own are an enumeration
        self.store: Store | None = None
        self.misfits: list[str] = []

    # transformers copies and writes down a model's configuration while it loads; this is a way in, not values.
    def __deepcopy__(self, memo: Any) -> StreamingConfig:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


class StreamingQuantizer(HfQuantizer):
    """Hands each weight that is to be in four bits to the store when it arrives."""

    requires_calibration = False

    def __init__(self, quantization_config: StreamingConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config
        self._names = quantization_config.store.names if quantization_config.store else set()

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return param_name in self._names

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        # By these transformers reserves a GPU's memory beforehand. Ours are placed by the store, some elsewhere.
        return 0.0 if param_name in self._names else float(param.element_size())

    def get_quantize_ops(self) -> ConversionOps:
        return _IntoStore(self.config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        # What the model is made of is no business of its config: an adapter's base is the 16-bit checkpoint.
        self.remove_quantization_config(model)
        return model

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def four_bit_of(q: QuantizationConfig) -> FourBit:
    """The recipe's `quantization` section as the number format."""
    return FourBit(q.bnb_4bit_quant_type, q.bnb_4bit_use_double_quant, getattr(torch, q.bnb_4bit_compute_dtype))


def four_bit_targets(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Name and shape of each weight that is to be in four bits: those of linear layers, and stacked experts
    [experts, out, in].

    Embeddings, the head, norms, biases and routers stay in 16 bits.
    """
    kept = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))
    targets = {}
    for path, module in model.named_modules():
        if type(module) is nn.Linear:
            targets[f"{path}.weight"] = module.weight.shape
        stacked = [(name, p) for name, p in module.named_parameters(recurse=False) if p.dim() == 3]
        targets.update({f"{path}.{name}": p.shape for name, p in stacked})
    return {name: shape for name, shape in targets.items() if not name.startswith(tuple(kept))}


class _IntoStore(ConversionOps):
    """The last operation on a tensor's way in: it goes into the store, and its four-bit form into its module."""

    def __init__(self, config: StreamingConfig) -> None:
        self.config = config

    def convert(
        self,
        input_dict: Mapping[str, Any],
        model: PreTrainedModel | None = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        store = self.config.store
        assert model is not None and store is not None
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            path, leaf = name.rpartition(".")[::2]
            module = model.get_submodule(path)
            expected = store.shape(name)
            if store.cached:
                dense = None
            elif dense.shape != expected:
                self.config.misfits.append(f"{name} is {list(dense.shape)}, the configuration has {list(expected)}")
                dense = dense.new_zeros(expected)  # all misfits are told at once
            install(module, leaf, store.weight(name, dense))
            cast(Any, module)._is_hf_initialized = True  # or transformers draws new weights for it
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


register_quantization_config(METHOD)(StreamingConfig)
register_quantizer(METHOD)(StreamingQuantizer)
