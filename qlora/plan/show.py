"""What `qlora plan` and `qlora doctor` print: the answer on the standard output, all else beside it."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from rich.console import Console
from transformers import AutoConfig

from qlora.config import Config
from qlora.machine import pick_device
from qlora.model.cache import cache_home
from qlora.plan.cards import machine_for, this_machine
from qlora.plan.doctor import doctor
from qlora.plan.measure import key_of, measure, remember
from qlora.plan.planner import Planner
from qlora.plan.planner import plan as plan_of
from qlora.plan.types import Machine

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, vocab_size of usual models, by parameters.
_USUAL = {
    "1B": (2048, 8192, 16, 32, 128256),
    "8B": (4096, 14336, 32, 32, 128256),
    "14B": (5120, 17408, 40, 40, 151936),
    "32B": (5120, 25600, 64, 64, 151936),
    "70B": (8192, 28672, 80, 64, 128256),
}


def show_plan(
    config: Config,
    card: str | None = None,
    vram_gib: float | None = None,
    host_gib: float | None = None,
    *,
    as_json: bool = False,
) -> None:
    """Print the plan of a recipe, for the machine that the three describe, or without them for this one.

    Raises MachineError for a machine that cannot be; PlanError, ModelError, AdapterError as `planner.plan`.
    """
    if card is None and vram_gib is None and host_gib is None:
        machine = this_machine(Path(config.training.output_dir), _aside)
    else:
        machine = machine_for(card, vram_gib, host_gib)
    with _only_ours(), _busy(f"simulating {config.model.model_name_or_path} on {machine.name}"):
        found = plan_of(config, machine)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    elif sys.stdout.isatty():
        Console().print(found)
    else:
        print(found)


def show_doctor(*, measuring: bool = False) -> None:
    """Print what this machine can train and what is wrong with it.

    measuring  try out its rates first, keep them, and say how fast it trains models of usual sizes
    """
    directory = cast(Path, cache_home("auto"))
    if not measuring:
        print(doctor(directory))
        return
    device = pick_device()
    _aside("measuring matrix products, memory, bus and disk: under 20 s")
    rates = measure(device, directory, _aside)
    remember(key_of(device), rates, _aside)
    print(doctor(directory, rates, largest_on))


def largest_on(machine: Machine) -> str:
    """How fast a machine trains models of usual sizes, up to the largest that fits; some seconds a size.

    The figures are the sketch's, which a plan's are within some percent of.
    """
    said = []
    for size in _USUAL:
        _aside(f"planning a model of {size}")
        with _only_ours():
            pace = _pace(size, machine)
        said.append(f"{size} {pace or 'does not fit'}")
        if pace is None:
            break
    return f"tokens/s: {', '.join(said)}; with 8 x 2,048 tokens a step, r 16. `qlora plan RECIPE` says more"


def _pace(size: str, machine: Machine) -> str | None:
    """Tokens a second at a size, and whether its layers are on disk; None: it does not fit."""
    hidden, intermediate, layers, heads, vocabulary = _USUAL[size]
    shape = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        tie_word_embeddings=size == "1B",
    )
    config = Config.model_validate({"model": {"model_name_or_path": size}, "data": {"datasets": [{"path": "unused"}]}})
    planner = Planner(config, machine, model_config=shape)
    best = planner.chosen([planner.space(), planner.space(lean=True)], planner.budget)[1].best
    if planner.budget.over(best.estimate):
        return None
    pace = planner.sketch.cut(best.choice["micro_batch_tokens"])[0] / best.estimate.seconds
    on_disk = best.choice["layers_on_device"] + best.choice["layers_on_host"] < layers
    return f"{pace:,.{0 if pace >= 10 else 1}f}{' from disk' if on_disk else ''}"


def _aside(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _busy(text: str) -> Iterator[None]:
    """A line that moves while something takes its seconds, where somebody looks."""
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def _only_ours() -> Iterator[None]:
    """Without what libraries say of a model that nobody is about to run."""
    library = logging.getLogger("transformers")
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.setLevel(level)
