"""The plan fits, to the byte, and nothing beside it that fits is faster."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora.errors import PlanError
from qlora.plan.plan import device_bytes
from qlora.plan.planner import Planner, plan
from qlora.plan.simulate import simulate
from qlora.plan.solve import TIE
from qlora.plan.types import Machine, Rates
from tests.conftest import tiny_config

SHAPE = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 1024, "num_hidden_layers": 8}
TOKENS, MICRO_BATCHES = 128, 6
RATES = Rates(flops=2e9, memory=4e9, bus=2e7, disk=1e7, host_memory=1e10, launch=1e-6)  # all of a tiny model matters
ROOM = 1 << 40


def machine(device=ROOM, host=ROOM, disk=ROOM) -> Machine:
    return Machine("a card", False, device, ROOM, 0, host, disk, RATES, watts=100.0)


@pytest.fixture(scope="module")
def planners():
    """planner(machine, **memory) -> a Planner; simulations are shared."""
    from qlora.config import Config

    simulators = {}

    def make(where: Machine, **memory) -> Planner:
        config = Config.model_validate(
            {
                "model": {"model_name_or_path": "tiny", "dtype": "bfloat16"},
                "data": {"datasets": [{"path": "unused.jsonl"}], "max_seq_length": TOKENS, "packing": False},
                "lora": {"r": 4},
                "training": {"gradient_accumulation_steps": MICRO_BATCHES, "optim": "adamw_torch", "max_steps": 7},
                "memory": memory,
            }
        )
        key = where.is_cpu, repr(sorted(memory.items()))
        planner = Planner(config, where, model_config=tiny_config("llama", **SHAPE), simulator=simulators.get(key))
        simulators[key] = planner.simulator
        return planner

    return make


@pytest.fixture(scope="module")
def least_and_most(planners):
    """Bytes of the device that the leanest choice takes, and the one with no limit, by the sketch."""
    planner = planners(machine())
    knobs = planner.space(lean=True).knobs
    leanest, most = ({knob: values[at] for knob, values in knobs.items()} for at in (-1, 0))
    leanest["layers_on_host"] = knobs["layers_on_host"][0]
    return planner.sketch.estimate(leanest).device, planner.sketch.estimate(most).device


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(share=st.floats(0.02, 1.1), host=st.sampled_from([1 << 21, 1 << 23, ROOM]))
def test_no_neighbour_of_the_choice_that_fits_is_faster(share, host, planners, least_and_most):
    least, most = least_and_most
    planner = planners(machine(int(least + share * (most - least)), host))
    spaces, estimate = [planner.space(), planner.space(lean=True)], planner.sketch.estimate
    space, solution = planner.chosen(spaces, planner.budget)
    best = solution.best
    if planner.budget.over(best.estimate):
        return  # nothing fits, which other tests are about
    for knob, values in space.knobs.items():
        at = values.index(best.choice[knob])
        for value in values[max(at - 1, 0) : at + 2]:
            neighbour = estimate(best.choice | {knob: value})
            if not planner.budget.over(neighbour):
                assert neighbour.seconds >= best.estimate.seconds * (1 - TIE), (knob, value)


def test_a_plan_fits_by_the_simulation_of_the_whole_step(planners, least_and_most):
    least, most = least_and_most
    for share in (0.1, 0.4, 0.9):
        planner = planners(machine(int(least + share * (most - least))))
        found = planner.plan()
        whole = simulate(
            found.config, tiny_config("llama", **SHAPE), planner.simulator.micro_batches(found.config.memory)
        )
        assert (found.usage.device, found.usage.host) == (whole.device, whole.host)
        assert device_bytes(found.usage, planner.machine) <= planner.machine.device


def test_a_sketch_that_says_too_little_is_found_out_and_something_that_fits_is_found(planners, least_and_most):
    least, most = least_and_most
    planner = planners(machine(int(least + 0.3 * (most - least))))
    said = planner.sketch.estimate
    planner.sketch.estimate = lambda choice: replace(said(choice), device=int(0.7 * said(choice).device))
    found = planner.plan()
    assert device_bytes(found.usage, planner.machine) <= planner.machine.device


FIXED = {
    "activations": "host",
    "embeddings": "device",
    "adapters": "device",
    "micro_batch_tokens": 0,
    "layer_tile_tokens": None,
    "loss_chunk_tokens": 64,
    "layers_on_device": 3,
    "layers_kept": 1,
    "layers_on_host": None,
}


def test_one_byte_too_little_is_refused_and_really_is_too_little(planners):
    needed = planners(machine(), **FIXED).plan()
    exactly = device_bytes(needed.usage, needed.machine)
    assert planners(machine(exactly), **FIXED).plan().usage.peak_bytes == needed.usage.peak_bytes
    short = planners(machine(exactly - 1), **FIXED)
    with pytest.raises(PlanError, match=r"(?s)needs .*a card has .* free.*fits:  memory\."):
        short.plan()
    whole = simulate(short.config, tiny_config("llama", **SHAPE), short.simulator.micro_batches(short.config.memory))
    assert whole.peak_bytes + needed.usage.slack > exactly - 1


@pytest.mark.parametrize("what", ["host", pytest.param("disk", marks=pytest.mark.exhaustive)])
def test_host_memory_and_disk_are_budgets_to_the_byte_too(what, planners):
    fixed = FIXED | ({"activations": "file"} if what == "disk" else {})
    needed = planners(machine(), **fixed).plan().usage
    nbytes = needed.host_bytes if what == "host" else needed.file_bytes
    planners(machine(**{what: nbytes}), **fixed).plan()
    with pytest.raises(PlanError, match="of host memory" if what == "host" else "of disk"):
        planners(machine(**{what: nbytes - 1}), **fixed).plan()


def test_what_the_recipe_fixes_stays_and_the_effective_batch_too(planners, least_and_most):
    least, most = least_and_most
    planner = planners(machine((least + most) // 2), activations="file", layers_on_device=2)
    found = planner.plan()
    assert (found.config.memory.activations, found.config.memory.layers_on_device) == ("file", 2)
    assert found.fixed == {"activations", "layers_on_device"}
    assert found.usage.tokens == TOKENS * MICRO_BATCHES
    assert found.config.training == planner.config.training


def test_where_nothing_fits_it_says_what_would(planners):
    with pytest.raises(PlanError, match=r"(?s)needs .* GiB") as refused:
        planners(machine(1 << 21)).plan()
    assert "data.max_seq_length" not in str(refused.value)  # not even the shortest
    fixed = {"activations": "device", "layers_kept": 7}
    needed = device_bytes(planners(machine(), **fixed).plan().usage, machine())
    with pytest.raises(PlanError, match=r"fits:  memory.layers_kept: \d"):
        planners(machine(needed // 2), **fixed).plan()


def test_with_room_for_everything_nothing_is_moved_and_nothing_computed_again(planners):
    memory = planners(machine()).plan().config.memory
    assert memory.layers_on_device is None and memory.layers_kept == 7
    assert (memory.activations, memory.embeddings, memory.adapters) == ("device", "device", "device")


def test_a_slower_bus_never_makes_a_plan_faster(planners, least_and_most):
    least, most = least_and_most
    where = machine((least + most) // 3)
    fast, slow = (
        planners(replace(where, rates=replace(RATES, bus=bus))).plan().time.seconds
        for bus in (RATES.bus, RATES.bus / 8)
    )
    assert slow >= fast * (1 - 2 * TIE)


def test_the_run_is_reckoned_from_its_steps(planners):
    found = planners(machine()).plan()
    assert found.steps == 7
    assert found.hours == pytest.approx(7 * found.time.seconds / 3600)
    assert found.kwh == pytest.approx(found.hours * 0.1)


def test_a_machine_without_an_accelerator_keeps_what_fits_in_its_memory(planners):
    def on_cpu(host):
        return Machine("CPU", True, host, host, 0, host, ROOM, RATES)

    roomy = planners(on_cpu(ROOM)).plan()
    assert roomy.config.memory.layers_kept == 7
    tight = planners(on_cpu(int(roomy.usage.peak_bytes * 0.7))).plan()
    assert tight.config.memory.layers_kept < 7
    assert tight.usage.peak_bytes <= roomy.usage.peak_bytes * 0.7


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_model_of_a_few_layers_is_planned_too(layers, planners):
    from qlora.config import Config

    config = Config.model_validate(
        {
            "model": {"model_name_or_path": "tiny"},
            "data": {"datasets": [{"path": "unused.jsonl"}], "max_seq_length": 64},
        }
    )
    shape = tiny_config("llama", **SHAPE | {"num_hidden_layers": layers})
    assert plan(config, machine(), model_config=shape).usage.layers == layers
    with pytest.raises(PlanError, match=r"needs [0-9.]+ GiB"):
        plan(config, machine(1 << 16), model_config=shape)


def test_plan_is_the_package_s_function():
    import qlora

    assert qlora.plan is plan
