"""The optimizer of a recipe: AdamW of torch or bitsandbytes, its schedule, and its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from qlora.config import TrainingConfig

# bitsandbytes' tables of 8-bit codes: one tensor that all parameters share, and that it makes anew itself
_CONSTANTS = ("qmap1", "qmap2")


def build(
    training: TrainingConfig, parameters: Mapping[str, nn.Parameter], steps: int, say: Callable[[str], None]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer and its schedule over `steps` optimizer steps.

    say  is told in a line where the device has not got what the recipe asks for
    """
    device = next(iter(parameters.values())).device
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]  # norms and biases do not decay
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    common: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }
    name = training.optim
    if name == "paged_adamw_8bit" and device.type != "cuda":
        say(f"optim: `paged_adamw_8bit` pages between a CUDA device and the host; on {device.type} it is `adamw_8bit`")
        name = "adamw_8bit"
    if name == "adamw_torch":
        # Fused: the default on a GPU makes temporaries as large as all the weights together.
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, fused=True, **common)
    else:
        from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

        optimizer = (PagedAdamW8bit if name == "paged_adamw_8bit" else AdamW8bit)(groups, **common)
    warmup = training.warmup_steps or math.ceil(training.warmup_ratio * steps)  # rounded as transformers does
    return optimizer, get_scheduler(training.lr_scheduler_type, optimizer, warmup, steps)


def settle(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Take a step with gradients of zero: the state is there then, and without weight decay no weight has moved."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """An optimizer's state as `<parameter>//<key>` -> tensor; numbers become tensors of one element."""
    return {
        f"{name}//{key}": (value if isinstance(value, torch.Tensor) else torch.tensor(value)).contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if key not in _CONSTANTS
    }


def state_nbytes(training: TrainingConfig, parameters: Mapping[str, nn.Parameter]) -> int:
    """Bytes of what `state_tensors` will give once there is a state."""
    if training.optim == "adamw_torch":
        return sum(2 * p.nbytes + 4 for p in parameters.values())
    # bitsandbytes: small tensors in float32; of others a byte a value and a float32 for each block of 256, twice.
    return sum(
        8 + (8 * n if n < 4096 else 2 * (n + 4 * -(-n // 256))) for n in (p.numel() for p in parameters.values())
    )


@torch.no_grad()
def restore(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what `state_tensors` gave. The weights are another one's to put back: they may have moved.

    Raises ValueError, before anything is put back, where the tensors are not those of such an optimizer.
    """
    kept = {name.rpartition("//")[0] for name in tensors}  # a parameter that never had a gradient has no state
    if not kept:
        raise ValueError("there is no state")
    # It makes its buffers itself, so that paged ones are paged.
    settle(optimizer, [parameter for name, parameter in parameters.items() if name in kept])
    if different := unlike(tensors, state_tensors(optimizer, parameters)):
        raise ValueError(different)
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        for key in state.keys() - {*_CONSTANTS}:
            saved, there = tensors[f"{name}//{key}"], state[key]
            if isinstance(there, torch.Tensor):
                there.copy_(saved)
            else:
                state[key] = type(there)(saved.item())


def unlike(tensors: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]) -> str:
    """In which tensor, by name, shape or type, the first mapping differs from the second; "" where in none."""
    for name in sorted(tensors.keys() | ours.keys()):
        found, expected = (
            f"{t.dtype} {list(t.shape)}" if (t := each.get(name)) is not None else "none" for each in (tensors, ours)
        )
        if found != expected:
            return f"{name} is {found.removeprefix('torch.')}, expected {expected.removeprefix('torch.')}"
    return ""
