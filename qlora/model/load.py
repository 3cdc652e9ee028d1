"""A base model, quantized as it streams in.

transformers builds the model, renames and merges a checkpoint's tensors and puts them where they belong. We come in at
its seam for quantizers: each weight that is to be four-bit is quantized when it arrives, and its 16-bit form dropped.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora.config import Config
from qlora.errors import ModelError
from qlora.model.nf4 import FourBit, four_bit_weights, quantize_
from qlora.model.source import Source

METHOD = "qlora_streaming"  # our name among transformers' quantization methods


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base model.

    parameters         how many it has
    four_bit_share     which part of them is in 4 bits, 0..1
    nbytes             bytes of all its weights at rest
    seconds            that loading took
    """

    model: PreTrainedModel
    source: Source
    parameters: int
    four_bit_share: float
    nbytes: int
    seconds: float


def load_base(config: Config, source: Source, device: torch.device) -> Base:
    """Load the recipe's base model onto `device`: NF4 under `method: qlora`, else in `model.dtype`.

    Host memory above what stays is one tensor. Frozen except under `method: full`.

    Raises ModelError.
    """
    started = time.perf_counter()
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    four_bit = None
    if config.method == "qlora":
        q = config.quantization
        compute = getattr(torch, q.bnb_4bit_compute_dtype)
        four_bit = FourBit(q.bnb_4bit_quant_type, q.bnb_4bit_use_double_quant, compute)
    model = _load(source, config, dtype, four_bit, device)
    model.requires_grad_(config.method == "full")
    quantized = four_bit_weights(model)
    in_four_bit = sum(w.shape.numel() for w in quantized)
    dense = [p for p in model.parameters() if p.numel()]
    parameters = in_four_bit + sum(p.numel() for p in dense)
    nbytes = sum(w.nbytes for w in quantized) + sum(p.numel() * p.element_size() for p in dense)
    seconds = time.perf_counter() - started
    return Base(model, source, parameters, in_four_bit / parameters, nbytes, seconds)


def _load(
    source: Source, config: Config, dtype: torch.dtype, four_bit: FourBit | None, device: torch.device
) -> PreTrainedModel:
    section = config.model
    model_config = source.config(section.trust_remote_code)
    skeleton = _skeleton(source, model_config, config, dtype)
    tensors = source.tensors(skeleton)
    # As transformers does for checkpoints that are quantized already; ours quantizes what is not.
    if getattr(model_config, "quantization_config", None) is not None and source.gguf is None:
        raise ModelError(
            f"{source.name}: is quantized already; give the 16-bit checkpoint, it is quantized as it streams in"
        )
    streaming = StreamingConfig(four_bit)
    try:
        model, info = cast(Any, type(skeleton)).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation=skeleton.config._attn_implementation,
            device_map={"": device},
            quantization_config=streaming,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{source.name}: its weights do not fit its configuration: {error}") from error
    kinds = ("missing_keys", "mismatched_keys", "conversion_errors", "error_msgs")
    wrong = streaming.misfits + [f"{what}: {key}" for what in kinds for key in sorted(info.get(what) or (), key=str)]
    if wrong:
        shown = "".join(f"\n  {line}" for line in wrong[:4]) + (f"\n  and {len(wrong) - 4} more" if wrong[4:] else "")
        raise ModelError(f"{source.name}: its weights do not fit its configuration:{shown}")
    model.config.name_or_path = model.name_or_path = source.name
    model.generation_config = _generation_config(source, model)
    return model


def _skeleton(source: Source, model_config: PreTrainedConfig, config: Config, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights."""

    def build(attention: str) -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                model_config,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=config.model.trust_remote_code,
            )

    attention = config.model.attn_implementation
    try:
        try:
            return build(attention)
        except ValueError as error:
            if attention != "sdpa" or "attn_implementation" not in str(error):
                raise
            warnings.warn(f"{source.name}: has no `sdpa` attention; `eager` is used", stacklevel=2)
            return build("eager")
    except (ValueError, ImportError) as error:
        raise ModelError(f"{source.name}: not a decoder that transformers can build: {error}") from error


def _generation_config(source: Source, model: PreTrainedModel) -> GenerationConfig:
    if source.gguf is None and (source.directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(source.directory)
    return GenerationConfig.from_model_config(model.config)


class StreamingConfig(QuantizationConfigMixin):
    """What `StreamingQuantizer` is told through `from_pretrained`, and what it answers.

    four_bit  None keeps every weight as it is
    misfits   weights that came in another shape than the model has
    """

    def __init__(self, four_bit: FourBit | None = None, **_: Any) -> None:
        self.quant_method = cast(Any, METHOD)  # transformers' own are an enumeration
        self.four_bit = four_bit
        self.misfits: list[str] = []


class StreamingQuantizer(HfQuantizer):
    """Quantizes each linear layer's weight, and each stack of experts, when it arrives.

    Embeddings, the head, norms, biases and routers stay in 16 bits.
    """

    requires_calibration = False

    def __init__(self, quantization_config: StreamingConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config
        self._targets: set[str] = set()

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self.config.four_bit is not None:
            kept = tuple(self.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ())))
            self._targets = {name for name in _quantizable(model) if not name.startswith(kept)}
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return param_name in self._targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        # What the model is made of is no business of its config: an adapter's base is the 16-bit checkpoint.
        self.remove_quantization_config(model)
        return model

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def _quantizable(model: nn.Module) -> set[str]:
    """Names of the weights of linear layers, and of stacked experts [experts, out, in]."""
    names = set()
    for path, module in model.named_modules():
        if type(module) is nn.Linear:
            names.add(f"{path}.weight")
        names.update(f"{path}.{name}" for name, p in module.named_parameters(recurse=False) if p.dim() == 3)
    return names


class _Quantize(ConversionOps):
    """The last operation on a tensor's way in: it goes into its module in four bits, and no further."""

    def __init__(self, config: StreamingConfig) -> None:
        self.config = config

    def convert(
        self,
        input_dict: Mapping[str, Any],
        model: PreTrainedModel | None = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        assert model is not None and self.config.four_bit is not None
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            path, leaf = name.rpartition(".")[::2]
            module = model.get_submodule(path)
            expected = getattr(module, leaf).shape
            if dense.shape != expected:
                self.config.misfits.append(f"{name} is {list(dense.shape)}, the configuration has {list(expected)}")
            quantize_(module, leaf, dense, self.config.four_bit)
            cast(Any, module)._is_hf_initialized = True  # or transformers draws new weights for it
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


register_quantization_config(METHOD)(StreamingConfig)
register_quantizer(METHOD)(StreamingQuantizer)
