"""LoRA over a frozen base: PEFT's adapter, our forward and backward.

PEFT owns the adapter: its `LoraConfig`, its initialisations and variants, its files. What is ours is the arithmetic of
a frozen linear with a LoRA on top, as one function that keeps of the dense weight nothing, and of the activations only
what the adapter's own gradient needs. It takes the plain case, which is nearly all of training; whatever else PEFT can
do (DoRA, merged or several adapters, mixed batches) runs in PEFT's own forward on the same layer.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from qlora.config import Config, DataConfig, DatasetConfig, LoraSection, ModelConfig
from qlora.errors import AdapterError
from qlora.model.load import build_skeleton
from qlora.model.nf4 import four_bit_weight, thawed
from qlora.model.source import Source
from qlora.model.untrusted import foreign, inspect, read_json, refuse_pickle


class FrozenLora(torch.autograd.Function):
    """y = x W^T + bias + scaling (dropped A^T) B^T, with W and bias frozen.

    x        [..., in]   what enters the base
    dropped  [..., in]   what enters the adapter: x, or x after the adapter's dropout
    A, B     [r, in], [out, r]   in their own dtype (fp32 master weights); computed in x's
    dense    () -> W [out, in]   asked again in the backward, so that no dense weight is kept between the two

    Gradients, with g = dL/dy and h = dropped A^T:
        dL/dB = scaling g^T h      dL/dA = scaling (g B)^T dropped      dL/dx = g W, + scaling g B A where x = dropped
    """

    @staticmethod
    def forward(ctx: Any, x, dropped, A, B, bias, dense, scaling: float) -> torch.Tensor:
        same = dropped is x
        x2, dropped2 = x.reshape(-1, x.shape[-1]), dropped.reshape(-1, x.shape[-1])
        A_, B_ = A.to(x.dtype), B.to(x.dtype)
        W = dense()
        y = x2 @ W.t() if bias is None else torch.addmm(bias, x2, W.t())
        h = dropped2 @ A_.t()
        y.addmm_(h, B_.t(), alpha=scaling)
        ctx.save_for_backward(dropped2, h, A, B)
        ctx.dense, ctx.scaling, ctx.same, ctx.shape = dense, scaling, same, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, g):  # type: ignore[override]
        dropped, h, A, B = ctx.saved_tensors
        g2 = g.reshape(-1, g.shape[-1])
        A_, B_ = A.to(g.dtype), B.to(g.dtype)
        gB = g2 @ B_  # [tokens, r]
        gB.mul_(ctx.scaling)
        dA = (gB.t() @ dropped).to(A.dtype)
        dB = (g2.t() @ h).mul_(ctx.scaling).to(B.dtype)
        dx = d_dropped = None
        if ctx.needs_input_grad[0]:
            dx = g2 @ ctx.dense()
            if ctx.same:
                dx.addmm_(gB, A_)
            dx = dx.view(ctx.shape)
        if not ctx.same and ctx.needs_input_grad[1]:
            d_dropped = (gB @ A_).view(ctx.shape)
        return dx, d_dropped, dA, dB, None, None, None


class FusedLoraLinear(PeftLoraLinear):
    """PEFT's LoRA linear, with the plain case in one function over the frozen weight."""

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PiSSA, OLoRA and their like write the residual to base_layer.weight.data, so that it must stand in 16 bit.
        config = kwargs.get("config")
        if isinstance(getattr(config, "init_lora_weights", None), str):
            with thawed(self.get_base_layer()):
                super().update_layer(adapter_name, *args, **kwargs)
        else:
            super().update_layer(adapter_name, *args, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self._plain_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        four_bit = four_bit_weight(base)
        if four_bit is None:
            dense = base.weight.detach
        else:
            # What bitsandbytes' own linear does: compute in compute_dtype whatever arrives, and answer in kind.
            dense = four_bit.forward
            dtype = four_bit.four_bit.compute_dtype
            if x.dtype != dtype:
                return self._fused(x.to(dtype), name, base, dense).to(x.dtype)
        return self._fused(x, name, base, dense)

    def _fused(self, x: torch.Tensor, name: str, base: nn.Module, dense: Any) -> torch.Tensor:
        dropout = self.lora_dropout[name]
        dropped = x if isinstance(dropout, nn.Identity) or not self.training else dropout(x)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        return FrozenLora.apply(x, dropped, A, B, bias, dense, self.scaling[name])

    def _plain_adapter(self) -> str | None:
        """The one active adapter, where it is LoRA and nothing more on a base that is frozen."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return None
        base = self.get_base_layer()
        frozen = all(not p.requires_grad for p in base.parameters(recurse=False))
        return name if frozen and type(base).forward is nn.Linear.forward else None


def attach(model: PreTrainedModel, section: LoraSection, seed: int) -> PeftModel:
    """Put a new LoRA on a frozen model.

    section  the recipe's `lora` section: PEFT's LoraConfig by field
    seed     of the adapter's initialisation

    Raises AdapterError, with PEFT's reason, where the section does not fit the model.
    """
    fields = section.model_dump(exclude={"autocast_adapter_dtype"}, exclude_none=True)
    try:
        config = _ours(LoraConfig(task_type="CAUSAL_LM", **fields))
        with torch.random.fork_rng(devices=[p.device for p in model.parameters() if p.is_cuda][:1]):
            torch.manual_seed(seed)
            with _quiet():
                adapted = get_peft_model(model, config, autocast_adapter_dtype=section.autocast_adapter_dtype)
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"this `lora` section does not fit the model: {error}") from error
    _drop_what_is_on_nothing(adapted, section)  # type: ignore[arg-type]
    if not section.autocast_adapter_dtype:
        for parameter in trainable(adapted).values():
            parameter.data = parameter.data.to(model.dtype)
    return adapted  # type: ignore[return-value]


def load_adapter(model: PreTrainedModel, path: str, trainable: bool = False) -> PeftModel:
    """Put the adapter in the directory `path`, PEFT's format, on its base. Its weights are safetensors.

    Raises AdapterError where there is none, where it does not fit, or where it asks for more than LoRA.
    """
    config = _ours(read_config(Path(path)))
    with foreign(f"{path}: not a LoRA adapter for this base", AdapterError), _quiet():
        adapted = PeftModel.from_pretrained(model, path, config=config, is_trainable=trainable)
    _refuse_what_is_on_nothing(adapted, config, path)
    return adapted


def add_adapter(model: PeftModel, path: str, name: str) -> None:
    """Put one more adapter beside those that a model has, frozen and not in use: `model.set_adapter(name)` takes it.

    Raises AdapterError as `load_adapter` does.
    """
    config = _ours(read_config(Path(path)))
    config.inference_mode = True
    with foreign(f"{path}: not a LoRA adapter for this base", AdapterError):
        model.add_adapter(name, config)  # first, as PEFT would read the file itself for a name that it does not know
        model.load_adapter(path, adapter_name=name)
    _refuse_what_is_on_nothing(model, config, path)


def changes_base(config: LoraConfig) -> bool:
    """Whether putting such an adapter on its base changes the base itself, so that no other answers there as it did."""
    start = config.init_lora_weights
    return config.bias != "none" or (isinstance(start, str) and start.startswith(("pissa", "olora")))


# What of an adapter_config.json is PEFT's own bookkeeping or harmless, beside what a recipe can ask for.
_BOOKKEEPING = {
    *("base_model_name_or_path", "revision", "task_type", "peft_type", "peft_version", "inference_mode"),
    *("fan_in_fan_out", "lora_bias", "trainable_token_indices", "ensure_weight_tying"),
}
_STARTS = "gaussian|mica|olora|orthogonal|pissa|pissa_niter_[0-9]{1,3}"
_UNUSED = {"auto_mapping", "runtime_config"}  # for PEFT's way to find a base; ours is found by the recipe


def read_config(directory: Path) -> LoraConfig:
    """An adapter's configuration, when nothing in it imports, downloads or allocates beyond what its weights hold."""
    path, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    if not path.is_file():
        raise AdapterError(f"{directory}: not a LoRA adapter: it has no {path.name}")
    inspect(directory, (path.name,), AdapterError)
    if not weights.is_file():  # PEFT would go on to a pickle, and then ask the hub
        for pickle in directory.glob("adapter_model.*"):
            refuse_pickle(pickle, AdapterError)
        raise AdapterError(f"{directory}: not a LoRA adapter: it has no {weights.name}")
    facts = read_json(path, AdapterError)
    if (kind := facts.get("peft_type")) != "LORA":
        raise AdapterError(f"{directory}: is {kind}, only LoRA is supported")
    ordinary = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    taken = {}
    for key, value in facts.items():
        if key in LoraSection.model_fields or key in _BOOKKEEPING:
            taken[key] = value
        elif value and key not in _UNUSED and value != ordinary.get(key):
            raise AdapterError(f"{path}: `{key}` is more than LoRA as it is done here; refused: {str(value)[:80]}")
    start = taken.get("init_lora_weights", True)
    if not isinstance(start, bool) and not re.fullmatch(_STARTS, str(start)):
        raise AdapterError(f"{path}: `init_lora_weights` is {start!r}, which is not supported")
    with foreign(f"{weights}: truncated or not a safetensors file", AdapterError), safe_open(weights, "pt") as f:
        shapes = {name: f.get_slice(name).get_shape() for name in f.keys()}  # noqa: SIM118 - no dict
    most = max(
        (shape[0] for name, shape in shapes.items() if re.search("lora_(embedding_)?A", name) and shape), default=0
    )
    pattern = taken.get("rank_pattern") or {}
    for rank in (taken.get("r", ordinary["r"]), *(pattern.values() if isinstance(pattern, dict) else [None])):
        if type(rank) is not int or not 1 <= rank <= most:  # PEFT makes room for it before it looks at the weights
            raise AdapterError(f"{path}: a rank of {rank!r}, but no weight in {weights.name} has more than {most}")
    with foreign(f"{path}: not a LoRA adapter", AdapterError):
        return LoraConfig(**taken)


def refuse_misfit(directory: Path, source: Source, trust_remote_code: bool = False) -> None:
    """Raise AdapterError where an adapter's matrices cannot be on a base, by their names and shapes.

    No weight is read, of the adapter or of the base. What is on bare parameters, as stacked experts, is believed.
    """
    section = ModelConfig(model_name_or_path=source.name, trust_remote_code=trust_remote_code)
    whole = Config(model=section, data=DataConfig(datasets=[DatasetConfig(path="none")]))
    modules = dict(build_skeleton(source.config(trust_remote_code), whole, source.name).named_modules())
    weights = directory / "adapter_model.safetensors"
    with foreign(f"{weights}: truncated or not a safetensors file", AdapterError), safe_open(weights, "pt") as f:
        shapes = {key: f.get_slice(key).get_shape() for key in f.keys()}  # noqa: SIM118 - no dict
    for key, shape in shapes.items():
        name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        module = modules.get(name.removesuffix(".base_layer"))
        if module is None:
            raise AdapterError(f"{directory}: is for another base than {source.name}, which has no {name}")
        weight, side = getattr(module, "weight", None), shape[1] if part[0] == "A" else shape[0]
        if weight is not None and weight.dim() == 2 and side not in weight.shape:
            raise AdapterError(
                f"{directory}: is for another base than {source.name}: its {name} is {list(weight.shape)},"
                f" the adapter's {part[0]} there {list(shape)}"
            )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _on_nothing(model: PeftModel, config: LoraConfig) -> list[str]:
    """Those of its `target_parameters` that the model has not, or not where PEFT could put a LoRA on them."""
    found: Any = model.base_model.targeted_parameter_names
    wanted = config.target_parameters or ()
    return sorted(each for each in wanted if not any(f".{name}".endswith(f".{each}") for name in found))


def _refuse_what_is_on_nothing(model: PeftModel, config: LoraConfig, where: str) -> None:
    """PEFT only warns, and the adapter is another one than it says: without its experts."""
    if missing := _on_nothing(model, config):
        called = [name.replace(".parametrizations", "") for name, _ in model.named_parameters()]
        packed = any(name.endswith(f".{missing[0]}.original") for name in called)
        raise AdapterError(
            f"{where}: no LoRA for {', '.join(missing)}: "
            + ("stacked in four bits, where PEFT has none; `method: lora` has" if packed else "no such parameter")
        )


def _drop_what_is_on_nothing(model: PeftModel, section: LoraSection) -> None:
    """Let a new adapter's config say what it is on.

    Under `all-linear` PEFT adds the stacked experts of some architectures, which it cannot adapt in four bits; what was
    asked for by name and is on nothing is AdapterError.
    """
    config: Any = model.peft_config["default"]
    missing = _on_nothing(model, config)
    if section.target_modules != "all-linear" or set(missing) & set(section.target_parameters or ()):
        _refuse_what_is_on_nothing(model, config, "this `lora` section does not fit the model")
    if missing:
        warnings.warn(f"no LoRA on {', '.join(missing)}: PEFT has none for experts stacked in four bits", stacklevel=3)
        config.target_parameters = [each for each in config.target_parameters if each not in missing] or None
        tuner: Any = model.base_model
        names = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
        for pattern in (config.rank_pattern, config.alpha_pattern):
            for key in [key for key in pattern if not any(re.match(rf"(.*\.)?({key})$", name) for name in names)]:
                del pattern[key]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PEFT and transformers warn of each other, about which a user can do nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _ours(config: LoraConfig) -> LoraConfig:
    # PEFT's documented way to bring one's own LoRA layer (developer guides, "Custom models"). It is not saved.
    config._register_custom_module({nn.Linear: FusedLoraLinear})
    return config
