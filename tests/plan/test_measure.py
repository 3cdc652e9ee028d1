"""Measuring ends in time with figures that can be believed; what is kept of it survives damage."""

import json
import math
import time

import pytest
import torch

from qlora.errors import MachineError
from qlora.machine import pick_device
from qlora.model.transfer import HOST
from qlora.plan import measure as measuring
from qlora.plan.measure import (
    RUNS,
    USUAL_DISK,
    calibrate,
    calibration,
    existing,
    key_of,
    measure,
    quick,
    recall,
    remember,
)
from qlora.plan.types import Rates

RATES = Rates(flops=1e12, memory=2e11, disk=3e9, host_memory=4e10, launch=5e-6)  # bus: infinite, as on a CPU


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qlora" / "machine.json"


@pytest.fixture
def said():
    return []


def believable(rates: Rates) -> bool:
    """Between a microcontroller and ten years from now."""
    return (
        1e8 < rates.flops < 1e17 and 1e8 < rates.memory < 1e14 and 1e6 < rates.disk < 1e12 and 0 < rates.launch < 1e-2
    )


def test_measuring_ends_in_time_and_gives_figures_to_believe(tmp_path, said, monkeypatch):
    monkeypatch.setattr(measuring, "SHARD", 8 << 20)
    start = time.perf_counter()
    rates = measure(HOST, tmp_path, said.append, budget=0.5)
    assert time.perf_counter() - start < 5  # ten times the budget: the machine has other work
    assert believable(rates) and rates.bus == math.inf and rates.host_memory == rates.memory
    assert not [line for line in said if "page cache" not in line]  # what a temporary file system makes it say
    assert list(tmp_path.iterdir()) == []


def test_a_device_whose_memory_is_taken_is_said(tmp_path, monkeypatch):
    def none_left(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB.")

    monkeypatch.setattr(measuring, "copying", none_left)
    with pytest.raises(MachineError, match="are free: close what uses it"):
        measure(HOST, tmp_path, print)


def test_a_rough_idea_takes_about_a_second(said):
    start = time.perf_counter()
    rates = quick(HOST)
    assert time.perf_counter() - start < 5
    assert believable(rates) and rates.disk == USUAL_DISK


def test_products_are_counted_as_two_flops_for_each_multiplication(monkeypatch):
    monkeypatch.setattr(measuring, "_seconds", lambda once, device, budget: 1e-3)
    assert measuring.multiplying(HOST, budget=0.2) >= 2 * 512**3 / 1e-3
    assert measuring.copying(HOST, budget=0.1) == 2 * (256 << 20) / 1e-3  # read, and written


def test_a_time_is_that_of_one_call_also_where_calls_are_repeated():
    assert measuring._seconds(lambda: time.sleep(0.002), HOST, 0.1) == pytest.approx(0.002, rel=1)  # sleep oversleeps


def test_a_full_disk_is_not_filled_further(tmp_path, said, monkeypatch):
    monkeypatch.setattr(measuring, "SHARD", 1 << 50)  # of which no disk has room for four
    assert measuring.reading(tmp_path, said.append, 1.0) == USUAL_DISK
    assert "too little room" in said[0] and list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_said_and_left_clean(tmp_path, said, monkeypatch):
    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(measuring, "SHARD", 1 << 20)
    monkeypatch.setattr(measuring.ShardReader, "read_into", fails)
    assert measuring.reading(tmp_path, said.append, 0.1) == USUAL_DISK
    assert "Input/output error" in said[0] and list(tmp_path.iterdir()) == []


def test_the_disk_of_a_directory_that_is_not_there_yet_is_its_parents(tmp_path):
    assert existing(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "file").touch()
    assert existing(tmp_path / "file" / "below") == tmp_path


def test_rates_are_recalled_as_they_were_for_this_machine_only(cache):
    assert recall("one", pytest.fail) is None
    remember("one", RATES, pytest.fail)
    remember("other", Rates(1.0, 2.0), pytest.fail)
    assert recall("one", pytest.fail) == RATES
    assert recall("third", pytest.fail) is None
    assert [file.name for file in cache.parent.iterdir()] == ["machine.json"]


def test_a_machine_is_known_by_its_name_and_its_memory():
    assert key_of(HOST).startswith("CPU, ") and key_of(HOST).endswith(" bytes")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"one": {"rates": {"flops": "fast"}}}',
        b'{"one": {"seconds": [0]}}',
        b'{"one": 1}',
        b'{"one": {"rates": {"flops": -1, "memory": 1}}}',
        b'{"one": {"rates": {"flops": 1, "memory": NaN}}}',
    ],
)
def test_a_damaged_file_counts_as_absent_and_is_said_and_can_be_written_again(cache, said, content):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    assert recall("one", said.append) is None
    assert calibration("one", said.append) == (None, None)
    assert len(said) == 2 and "machine.json" in said[0]
    remember("one", RATES, said.append)
    assert recall("one", pytest.fail) == RATES


def test_a_file_cut_short_anywhere_is_absent_or_whole(cache):
    remember("one", RATES, pytest.fail)
    whole = cache.read_bytes()
    for end in range(0, len(whole), 7):
        cache.write_bytes(whole[:end])
        assert recall("one", lambda _: None) is None


def test_a_place_that_cannot_be_written_is_said(cache, said):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the directory should be")
    remember("one", RATES, said.append)
    assert "not kept" in said[-1]


def test_calibration_is_the_median_of_the_latest_runs(cache):
    for ratio in (4.0, *[1.0, 1.2] * (RUNS // 2 - 1), 1.1, 1.1):  # the first one is forgotten
        calibrate("one", ratio, 2 * ratio, pytest.fail)
    seconds, nbytes = calibration("one", pytest.fail)
    assert seconds == pytest.approx(1.1) and nbytes == pytest.approx(2.2)
    kept = json.loads(cache.read_text())["one"]
    assert len(kept["seconds"]) == RUNS and 4.0 not in kept["seconds"]
    assert calibration("other", pytest.fail) == (None, None)


def test_calibration_leaves_the_rates_alone(cache):
    remember("one", RATES, pytest.fail)
    calibrate("one", 1.5, 1.0, pytest.fail)
    assert recall("one", pytest.fail) == RATES
    remember("one", Rates(1.0, 2.0), pytest.fail)
    assert calibration("one", pytest.fail) == (1.5, 1.0)


@pytest.mark.parametrize("ratio", [0.0, 0.09, 11.0, -1.0, math.inf, math.nan])
def test_a_ratio_that_cannot_be_believed_is_refused_and_the_other_one_kept(cache, said, ratio):
    calibrate("one", ratio, 1.01, said.append)
    assert calibration("one", pytest.fail) == (None, 1.01)
    assert len(said) == 1 and "seconds" in said[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
def test_measuring_an_accelerator_gives_what_accelerators_do(tmp_path, said):
    device = pick_device()
    start = time.perf_counter()
    rates = measure(device, tmp_path, said.append)
    assert time.perf_counter() - start < 20
    assert believable(rates) and rates.flops > 5e12 and rates.memory > 1e11 and 1e9 < rates.bus < 1e12
    assert rates.launch < 1e-4
