"""What each card does with each model: the README's table, from plans. No GPU, no weights, no network.

usage: python benchmarks/plans.py [--shapes NAME,...] [--cards NAME,...] [--out FILE]

The recipe is that of every cell: qlora, r 16 on all linear layers, 16 sequences of 2,048 tokens a step (packed), 8-bit
AdamW; all of the `memory` section is for the plan to choose. The machine has 64 GiB of host memory and as much room on
an NVMe drive as is needed; a card's rates are its data sheet's, at the shares that programs reach. So the figures are
predictions, each with what it rests on in the JSON file.

A row's plans share a simulator, as a step is the same on all cards until something is placed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.logging import set_verbosity_error

from qlora.bench.environment import surroundings, today
from qlora.bench.shapes import HOME
from qlora.config import Config
from qlora.errors import PlanError
from qlora.model.source import config_of
from qlora.plan.cards import find, machine_for
from qlora.plan.periodic import Simulator
from qlora.plan.planner import Planner

RESULTS, RANK = Path(__file__).parent / "results", 16
MODELS = {
    "llama3.1-8b": "Llama-3.1-8B",
    "qwen3-14b": "Qwen3-14B",
    "gemma3-27b": "Gemma-3-27B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "qwen3-32b": "Qwen3-32B",
    "mixtral-8x7b": "Mixtral-8x7B",
    "llama3.3-70b": "Llama-3.3-70B",
}
CARDS = ("rtx4060", "rtx4070", "rtx4080", "rtx4090", "rtx5090", "h100")  # 8, 12, 16, 24, 32, 80 GB
HOST_GIB = 64
SEQUENCES, TOKENS = 16, 2048  # of a step, of a sequence


def recipe(shape: str) -> Config:
    """The same for every cell."""
    return Config.model_validate(
        {
            "model": {"model_name_or_path": str(HOME / f"{shape}.json")},
            "lora": {"r": RANK},
            "data": {"datasets": [{"path": "unused"}], "max_seq_length": TOKENS},
            "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": SEQUENCES},
        }
    )


def planned(shape: str, card: str, simulator: Simulator | None) -> tuple[dict[str, Any], Simulator]:
    """A cell, and the simulator for the next."""
    config = recipe(shape)
    machine = machine_for(card, host_gib=HOST_GIB)
    planner = Planner(config, machine, model_config=config_of(config.model), simulator=simulator)
    started = time.perf_counter()
    about: dict[str, Any] = {"shape": shape, "card": card}
    try:
        plan = planner.plan()
    except PlanError as error:
        return about | {"does_not_fit": str(error)}, planner.simulator
    about["seconds_to_plan"] = time.perf_counter() - started
    return about | {"plan": plan.as_json() | {"model": MODELS[shape]}}, planner.simulator


def cell(about: Mapping[str, Any]) -> str:
    """Tokens a second, and where the layers that are not on the card are brought from: `27 (12 host, 68 disk)`."""
    if "plan" not in about:
        return "does not fit"
    plan = about["plan"]
    memory, layers = plan["memory"], plan["usage"]["layers"]
    here = layers if memory["layers_on_device"] is None else min(memory["layers_on_device"], layers)
    on_host = layers - here if memory["layers_on_host"] is None else min(memory["layers_on_host"], layers - here)
    away = [(on_host, "host"), (layers - here - on_host, "disk")]
    places = ", ".join(f"{n} {where}" for n, where in away if n)
    return f"{plan['tokens_per_second']:,.0f}" + (f" ({places})" if places else "")


def table(plans: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each model, a column for each card."""
    cells = {(about["shape"], about["card"]): cell(about) for about in plans}
    shapes, cards = (list(dict.fromkeys(about[key] for about in plans)) for key in ("shape", "card"))
    titles = [f"{find(card).name}, {find(card).vram_gib:g} GB" for card in cards]
    rows = [["model", *titles], ["---", *["---:"] * len(cards)]]
    rows += [[MODELS[shape], *(cells[shape, card] for card in cards)] for shape in shapes]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def names(text: str) -> list[str]:
    """Shapes, with commas."""
    given = text.split(",")
    if unknown := [name for name in given if name not in MODELS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(MODELS)}")
    return given


def keys(text: str) -> list[str]:
    """Cards, with commas. Raises MachineError for one that is unknown, before minutes are spent on the others."""
    return [find(name).key for name in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=names, default=list(MODELS), help="these alone, with commas")
    parser.add_argument("--cards", type=keys, default=list(CARDS), help="these instead, as `qlora plan` takes them")
    parser.add_argument("--out", type=Path, default=RESULTS / f"plans_{today()[:10]}.json")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    set_verbosity_error()
    around = {"date": today(), **surroundings()}
    plans: list[dict[str, Any]] = []
    for shape in asked.shapes:
        simulator = None
        for card in asked.cards:
            started = time.perf_counter()
            about, simulator = planned(shape, card, simulator)
            plans.append(about)
            took = time.perf_counter() - started
            print(f"{shape} on {card}: {cell(about)}; {took:.0f} s", file=sys.stderr, flush=True)
    setting = {"host_gib": HOST_GIB, "sequences": SEQUENCES, "tokens": TOKENS}
    shown = table(plans)
    asked.out.write_text(json.dumps(around | {"setting": setting, "table": shown, "plans": plans}, indent=1) + "\n")
    print(shown)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
