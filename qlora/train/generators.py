"""The state of every random number generator that a process shares, as JSON.

Nothing of ours draws from them: each choice follows from the seed and the number of the step or epoch. What others draw
(a custom optimizer, a model's own code) goes on with a resumed run too.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def state(device: torch.device) -> dict[str, Any]:
    """Of Python, NumPy, torch on the CPU, and torch on `device` where that is another."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    found = {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), keys.tolist(), position, has_gauss, cached],  # type: ignore[union-attr]
        "torch": _text(torch.get_rng_state()),
    }
    if device.type == "cuda":
        found["device"] = _text(torch.cuda.get_rng_state(device))
    return found


def restore(saved: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `state` gave. A device of another kind keeps its own.

    Raises ValueError, TypeError, KeyError, OverflowError or RuntimeError for what no generator can be in.
    """
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = saved["numpy"]
    if len(keys) != 624 or not 0 <= position <= 624:  # NumPy reads where it is told to
        raise ValueError("NumPy's generator has 624 numbers and is at one of them")
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(saved["torch"]))
    if device.type == "cuda" and "device" in saved:
        torch.cuda.set_rng_state(_tensor(saved["device"]), device)


def _text(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
