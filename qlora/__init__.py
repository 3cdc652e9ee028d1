"""qlora: fine-tune language models on consumer GPUs.

import qlora

config = qlora.load_recipe("recipes/quickstart.yaml")
print(qlora.plan(config))
qlora.train(config)
print(qlora.generate(config.training.output_dir, "..."))
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora.plan.planner import plan as plan
    from qlora.recipe import load_recipe as load_recipe
    from qlora.run import generate as generate
    from qlora.run import train as train

__version__ = "0.1.0"
__all__ = ["__version__", "generate", "load_recipe", "plan", "train"]

_HOMES = {
    "load_recipe": "qlora.recipe",
    "plan": "qlora.plan.planner",
    "train": "qlora.run",
    "generate": "qlora.run",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: torch alone takes seconds, and `qlora --help` should not.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """Keeps `qlora.train` and `qlora.plan` the functions: Python puts the folder of that name there once somebody
    imports from it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
