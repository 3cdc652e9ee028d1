"""What the headers of the recipes say is planned is what the simulation gives."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from qlora.config import Config
from qlora.plan.simulate import simulate
from qlora.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SHAPES = {  # by recipe; the first word of a recipe's name and of a shape's are the same
    path.stem: ROOT / "benchmarks" / "shapes" / f"{path.stem.split('_')[0]}.json"
    for path in sorted((ROOT / "recipes").glob("*gb*.yaml"))
}


def test_the_recipes_are_there():
    assert len(SHAPES) == 6 and all(path.is_file() for path in SHAPES.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * ("70b" not in name)) for name in SHAPES]
)
def test_the_planned_peak_in_a_recipes_header_is_the_simulated_one(name):
    path = ROOT / "recipes" / f"{name}.yaml"
    stated = float(re.search(r"peak ([\d.]+) GiB", path.read_text()).group(1))
    card = float(re.search(r"_(\d+)gb", name).group(1))
    assert peak_gib(name, load_recipe(path)) == pytest.approx(stated, rel=0.02)
    assert stated + 0.5 < 0.96 * card * 1e9 / 2**30  # with the context, and something for whoever draws the screen


def peak_gib(name: str, config: Config) -> float:
    """From steps with few layers and few micro-batches: each more of them adds to the peak what the one before did.

    That is so where adapters, hidden states and ends are on the host; test_simulate proves it for layers.
    """
    memory, shape = config.memory, json.loads(SHAPES[name].read_text())
    assert (memory.activations, memory.adapters, memory.embeddings) in {(x, "host", "host") for x in ("host", "file")}

    def peak(layers: int, on_device: int | None, k: int) -> int:
        changes = {} if on_device is None else {"layers_on_device": on_device}
        here = config.model_copy(update={"memory": memory.model_copy(update=changes)})
        micro_batches = [(1, config.data.max_seq_length)] * k
        return simulate(here, AutoConfig.for_model(**shape | {"num_hidden_layers": layers}), micro_batches).peak_bytes

    placed = memory.layers_on_device
    layers, k = shape["num_hidden_layers"], config.training.gradient_accumulation_steps
    # One layer in each place that the recipe uses, and one more where it counts.
    few = (2, None if placed is None else min(placed, 1), min(k, 2))
    start = peak(*few)
    norms = 2 * shape["hidden_size"] * 2  # bytes a layer, which are on the device wherever the layer is
    total = start + (k - few[2]) * (peak(*few[:2], few[2] + 1) - start if k > few[2] else 0)
    if placed == 0:
        return (total + (layers - 2) * norms) / 2**30
    more = peak(3, None if placed is None else 2, few[2]) - start  # one more on the device
    on_device = layers - 2 if placed is None else placed - 1
    return (total + on_device * more + (layers - 2 - on_device) * norms) / 2**30
