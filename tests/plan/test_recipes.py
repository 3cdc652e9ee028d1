"""What the headers of the recipes say is planned is what the simulation and the time model give."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from qlora.model.homes import layout_of, padded
from qlora.model.load import four_bit_of
from qlora.plan.cards import machine_for
from qlora.plan.periodic import Simulator
from qlora.plan.plan import device_bytes
from qlora.plan.seconds import time_of
from qlora.plan.simulate import BOUNDARIES
from qlora.recipe import load_recipe

GIB = 2**30
ROOT = Path(__file__).parents[2]
SHAPES = {  # by recipe; the first word of a recipe's name and of a shape's are the same
    path.stem: ROOT / "benchmarks" / "shapes" / f"{path.stem.split('_')[0]}.json"
    for path in sorted((ROOT / "recipes").glob("*gb*.yaml"))
}


QUICK = {"llama3.1-8b_8gb", "llama3.3-70b_24gb"}


def test_the_recipes_are_there():
    assert len(SHAPES) == 6 and all(path.is_file() for path in SHAPES.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name not in QUICK)) for name in SHAPES]
)
def test_the_figures_in_a_recipes_header_are_the_planned_ones(name):
    path = ROOT / "recipes" / f"{name}.yaml"
    header = path.read_text().split("\nmethod:")[0].replace("\n# ", " ")
    config = load_recipe(path)
    shape = AutoConfig.for_model(**json.loads(SHAPES[name].read_text()))
    simulator = Simulator(config, shape, config.data.max_seq_length)
    usage = simulator.usage(config.memory)
    machine = machine_for(stated(r"on an (RTX [\w ]+ GB)", header))

    assert float(stated(r"peak ([\d.]+) GiB of VRAM", header)) == pytest.approx(usage.peak_bytes / GIB, rel=0.01)
    assert float(stated(r"([\d.]+) GiB of host memory", header)) == pytest.approx(usage.host_bytes / GIB, rel=0.02)
    on_disk = cache_bytes(simulator) + usage.file.get(BOUNDARIES, 0)
    assert float(stated(r"([\d.]+) GiB of disk", header)) == pytest.approx(on_disk / GIB, rel=0.02)
    tokens_a_second = usage.tokens / time_of(usage, machine.rates).seconds
    assert float(stated(r"(\d+) tokens/s", header)) == pytest.approx(tokens_a_second, rel=0.02)
    assert device_bytes(usage, machine) <= machine.device
    assert f"_{round(machine.device_total / GIB)}gb" in name


def stated(pattern: str, header: str) -> str:
    """What the header says."""
    found = re.search(pattern, header)
    assert found is not None, pattern
    return found.group(1)


def cache_bytes(simulator: Simulator) -> int:
    """Of the NF4 cache: the four-bit layers, and all else as it is."""
    four_bit = four_bit_of(simulator.config.quantization)
    names = {name for inside in simulator.groups.values() for name in inside}
    others = {id(p): p.nbytes for name, p in simulator.whole.named_parameters() if name not in names}
    return sum(others.values()) + sum(padded(layout_of(each, four_bit).nbytes) for each in simulator.groups.values())
