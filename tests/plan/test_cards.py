"""Cards have figures that agree with each other, are found by any spelling, and make machines that add up."""

import math

import pytest
import torch

from qlora.errors import MachineError
from qlora.machine import GIB
from qlora.plan import cards
from qlora.plan.cards import (
    CARDS,
    CONTEXT,
    DESKTOP,
    DRIVER,
    DRIVER_SHARE,
    find,
    identify,
    machine_for,
    pcie,
    this_machine,
)
from qlora.plan.measure import calibrate, key_of, remember
from qlora.plan.types import Rates

# What the table was not made from: streaming multiprocessors and boost clock in MHz, of the vendor's specifications.
CLOCKS = {
    "rtx3060": (28, 1777),
    "rtx3060ti": (38, 1665),
    "rtx3070": (46, 1725),
    "rtx3070ti": (48, 1770),
    "rtx3080": (68, 1710),
    "rtx3080ti": (80, 1665),
    "rtx3090": (82, 1695),
    "rtx3090ti": (84, 1860),
    "rtx4060": (24, 2460),
    "rtx4060ti": (34, 2535),
    "rtx4070": (46, 2475),
    "rtx4070super": (56, 2475),
    "rtx4070ti": (60, 2610),
    "rtx4070tisuper": (66, 2610),
    "rtx4080": (76, 2505),
    "rtx4080super": (80, 2550),
    "rtx4090": (128, 2520),
    "rtx5060": (30, 2497),
    "rtx5060ti": (36, 2572),
    "rtx5070": (48, 2512),
    "rtx5070ti": (70, 2452),
    "rtx5080": (84, 2617),
    "rtx5090": (170, 2407),
}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.key)
def test_a_card_has_figures_that_agree_with_each_other(card):
    assert 0.93 < card.mib / 1024 / card.vram_gib <= 1.0, "the driver reports a little less than what is sold"
    assert 50 < card.tflops * 1e3 / card.memory_gb_s < 500, "FLOP a byte: no card of today is outside"
    assert 5 < card.memory_gb_s / card.pcie_gb_s < 100
    assert 0.1 < card.tflops / card.watts < 3
    assert card.source
    assert all(0 < rate < math.inf for rate in (card.rates.flops, card.rates.memory, card.rates.bus, card.rates.disk))


def test_geforce_cards_do_what_their_clocks_allow():
    """512 FLOP a cycle and multiprocessor, in bf16 with sums in fp32: 2 x 4 tensor cores x 64 products."""
    assert set(CLOCKS) == {card.key for card in CARDS if card.name.startswith("RTX") and "A6000" not in card.name}
    for key, (multiprocessors, mhz) in CLOCKS.items():
        assert find(key).tflops == pytest.approx(multiprocessors * mhz * 512 / 1e6, rel=0.005), key


def test_every_card_of_the_issue_is_there():
    wanted = "3060 12, 3070 8, 3080 10, 3090 24, 4060 8, 4060ti 16, 4070 12, 4080 16, 4090 24, 5060 8, 5070 12, 5080 16"
    wanted += ", 5090 32, a100-40gb 40, a100-80gb 80, l4 24, h100 80, h200 141"
    for name, gib in (each.split() for each in wanted.split(", ")):
        assert find(name).vram_gib == float(gib)


def test_pcie_reaches_what_copies_are_known_to_reach():
    assert pcie(4, 16) == pytest.approx(25, rel=0.02)  # the figure that streaming is reckoned with everywhere
    assert pcie(4, 8) == pytest.approx(pcie(3, 16)) == pytest.approx(pcie(5, 16) / 4, rel=0.01)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.key)
def test_a_card_is_found_by_its_key_and_its_name(card):
    assert find(card.key) is find(card.name) is find(f"NVIDIA {card.name.upper()}") is card


@pytest.mark.parametrize(
    "written, key",
    [
        ("rtx4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("rtx-4090 24gb", "rtx4090"),
        ("4060ti", "rtx4060ti"),
        ("RTX 4060 Ti 16 GB", "rtx4060ti"),
        ("rtx_4070_ti_super", "rtx4070tisuper"),
        ("a100-80gb", "a100-80gb"),
        ("A100 40GB", "a100-40gb"),
        ("a100 40", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("h100", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("H100 PCIe", "h100-pcie"),
        ("A6000", "rtxa6000"),
    ],
)
def test_a_card_is_found_however_it_is_written(written, key):
    assert find(written).key == key


@pytest.mark.parametrize(
    "written, named",
    [
        ("rtx4091", "rtx4090"),
        ("4060 ti 8gb", "rtx4060ti"),
        ("a100", "a100-40gb, a100-80gb"),
        ("zzz", "there are rtx3060"),
        ("", "rtx3060"),
    ],
)
def test_a_card_that_is_not_known_gets_the_nearest_names(written, named):
    with pytest.raises(MachineError) as error:
        find(written)
    assert named in str(error.value) and "--vram" in str(error.value)


@pytest.mark.parametrize(
    "name, gib, key",
    [
        ("NVIDIA GeForce RTX 3060", 11.76, "rtx3060"),
        ("NVIDIA GeForce RTX 4070 SUPER", 11.6, "rtx4070super"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 79.2, "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H100 PCIe", 79.1, "h100-pcie"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA RTX A6000", 47.5, "rtxa6000"),
        ("NVIDIA L4", 22.0, "l4"),
    ],
)
def test_a_card_is_identified_by_what_torch_calls_it(name, gib, key):
    assert identify(name, int(gib * GIB)).key == key


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4", "NVIDIA A10G", "NVIDIA A100 80GB PCIe MIG 1g.10gb", "xpu"],
)
def test_another_card_with_a_like_name_is_not_identified(name):
    assert identify(name, 16 * GIB) is None


def test_a_card_with_other_memory_keeps_its_rates_and_says_so():
    card = identify("NVIDIA GeForce RTX 4060 Ti", int(7.8 * GIB))
    assert card.name == "RTX 4060 Ti with 7.8 GiB" and card.tflops == find("4060ti").tflops
    assert card.mib == int(7.8 * 1024)


def test_a_machine_by_card_leaves_the_driver_and_the_desktop_what_they_hold():
    machine = machine_for("rtx4090")
    assert machine.device_total == 24564 << 20
    assert machine.device == int(machine.device_total * (1 - DRIVER_SHARE) - DRIVER - DESKTOP)
    assert machine.context == CONTEXT and not machine.is_cpu and machine.disk is None and not machine.measured
    assert machine.host == 28 * GIB  # of the usual 32, whatever this machine has
    assert (machine.name, machine.watts, machine.rates) == ("RTX 4090", 450, find("4090").rates)
    assert machine_for("4090", host_gib=64).host == 60 * GIB
    assert machine_for("4090", host_gib=2).host == 0


@pytest.mark.parametrize("name, seen", [("4090", 23.65), ("3060", 11.75), ("5090", 31.37), ("a100-80gb", 79.25)])
def test_the_driver_is_left_at_least_what_it_was_seen_to_hold(name, seen):
    """`seen`: the total that torch's out-of-memory errors report on such cards, GiB."""
    machine = machine_for(name)
    desktop = DESKTOP if find(name).has_desktop else 0
    assert seen - 0.15 < (machine.device + desktop) / GIB <= seen


@pytest.mark.parametrize(
    "gib, rates_of",
    [
        (10, "RTX 3080"),
        (8, "RTX 4060"),
        (6, "RTX 4060"),
        (12, "RTX 3060"),
        (11, "RTX 3060"),
        (16, "RTX 4060 Ti"),
        (24, "RTX 3090"),
        (23.5, "RTX 3090"),
        (48, "RTX A6000"),
        (80, "A100 80 GB"),
        (192, "H200"),
    ],
)
def test_a_machine_by_memory_alone_has_the_rates_of_the_slowest_such_card(gib, rates_of):
    machine = machine_for(None, gib)
    assert machine.name == f"a card with {gib:g} GiB (rates of {rates_of})"
    assert machine.rates == find(rates_of).rates and machine.device_total == int(gib * GIB)


def test_a_card_can_be_planned_with_other_memory():
    machine = machine_for("rtx3080", 12)
    assert machine.name == "RTX 3080 with 12 GiB" and machine.device_total == 12 * GIB
    assert machine.rates == find("rtx3080").rates


@pytest.mark.parametrize(
    "how", [(None, None, 64), ("4090", 0, None), (None, -1, None), (None, math.nan, None), ("4090", None, 0)]
)
def test_a_machine_that_makes_no_sense_is_refused(how):
    with pytest.raises(MachineError, match="--"):
        machine_for(*how)


def test_this_machine_has_what_is_free_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = this_machine(tmp_path / "not" / "there" / "yet")
    assert 0 < machine.device <= machine.device_total and machine.disk and machine.disk > 0
    assert machine.rates.flops > 0 and not machine.measured and machine.seconds_ratio is None


def test_this_machine_knows_what_was_measured_and_how_plans_came_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key, rates = key_of(cards.pick_device()), Rates(1e12, 1e11, disk=2e9)
    remember(key, rates, pytest.fail)
    calibrate(key, 1.1, 0.98, pytest.fail)
    machine = this_machine(tmp_path)
    assert (machine.rates, machine.measured) == (rates, True)
    assert (machine.seconds_ratio, machine.bytes_ratio) == (1.1, 0.98)


def test_an_accelerators_free_memory_counts_its_context_once_and_honours_a_cap(monkeypatch):
    """torch's readings stood in for: the context is in what CUDA counts as used, and comes off again as `context`."""
    device, total = torch.device("cuda", 0), 24 * GIB
    monkeypatch.setattr(cards, "free_bytes", lambda _: 20 * GIB)
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda _: 1 * GIB)
    fraction = {"is": 1.0}
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fraction["is"])
    assert cards._free(device, total) == 21 * GIB + cards.CONTEXT_AT_ONCE
    fraction["is"] = 0.5
    assert cards._free(device, total) == 12 * GIB + CONTEXT
