"""The doctor names what is wrong, and nothing that is not."""

from dataclasses import replace

import pytest
import torch

from qlora.machine import GIB
from qlora.model.transfer import HOST
from qlora.plan import doctor as doctoring
from qlora.plan.doctor import Facts, doctor, driver_of, findings, look, needed, nf4_on
from qlora.plan.types import Rates

FLOORS = {"torch": "2.11", "transformers": "5.17", "peft": "0.21", "bitsandbytes": "0.50"}
HEALTHY = Facts(
    versions={"torch": "2.11.0+cu128", "transformers": "5.23.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"},
    floors=FLOORS,
    elsewhere=None,
    other_environment=None,
    card=True,
    driver="580.126.09",
    driver_cuda="13.0",
    driver_error=None,
    torch_cuda="12.8",
    device="NVIDIA GeForce RTX 3060",
    torch_error=None,
    bf16=True,
    nf4=(0.073, 0.0),
    lock_error=None,
    ram_free=24 * GIB,
    ram=32 * GIB,
    swap=8 * GIB,
    disk_free=400 * GIB,
)
BLIND = {"device": None}  # torch sees no card
PLANTED = {
    "torch without CUDA": (BLIND | {"torch_cuda": None}, "problem", "built without CUDA", "CUDA 13.0 or older"),
    "torch too new for the driver": (
        BLIND | {"torch_cuda": "13.0", "driver_cuda": "12.4"},
        "problem",
        "built for CUDA 13.0",
        "CUDA 12",
    ),
    "a hidden card": (
        BLIND | {"torch_error": "No CUDA GPUs are available"},
        "problem",
        "No CUDA GPUs",
        "VISIBLE_DEVICES",
    ),
    "no driver": (BLIND | {"driver": None, "driver_cuda": None}, "problem", "no driver", "install"),
    "a driver that does not answer": (
        BLIND | {"driver_error": "Failed to initialize NVML: Driver/library version mismatch"},
        "problem",
        "version mismatch",
        "restart",
    ),
    "no card": (BLIND | {"card": False, "driver": None, "torch_cuda": None}, "warning", "on the CPU", "--card"),
    "a card without bf16": ({"bf16": False}, "warning", "emulates bf16", "float32"),
    "a back end that is missing": ({"nf4": "no kernel image is available"}, "problem", "no kernel image", "update"),
    "a back end that is wrong": ({"nf4": (0.3, 0.25)}, "problem", "NF4 is wrong", "do not train"),
    "a back end that gives NaN": ({"nf4": (float("nan"),) * 2}, "problem", "NF4 is wrong", "do not train"),
    "pages that cannot be locked": ({"lock_error": "CUDA error 2"}, "warning", "page-locked", "ulimit -l"),
    "an old package": ({"versions": {**HEALTHY.versions, "peft": "0.9.3"}}, "problem", "peft 0.9.3", "peft>=0.21"),
    "a missing package": ({"versions": {**HEALTHY.versions, "peft": None}}, "problem", "peft is missing", "peft>=0.21"),
    "another environment": ({"other_environment": "/home/x/venv"}, "warning", "/home/x/venv", "deactivate"),
    "a torch from outside": ({"elsewhere": "/home/x/.local/torch"}, "warning", "/home/x/.local", "PYTHONNOUSERSITE"),
    "a nearly full disk": ({"disk_free": 5 * GIB}, "warning", "5.0 GiB free", "nf4_cache_dir"),
    "a full disk": ({"disk_free": GIB}, "problem", "1.0 GiB free", "nf4_cache_dir"),
    "a full host": ({"ram_free": GIB}, "warning", "1.0 of 32.0 GiB free", "close programs"),
}


def test_a_healthy_machine_has_nothing_wrong():
    found = list(findings(HEALTHY))
    assert {finding.level for finding in found} == {"ok"} and not any(finding.todo for finding in found)


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_named_and_nothing_else(name):
    change, level, what, todo = PLANTED[name]
    wrong = [finding for finding in findings(replace(HEALTHY, **change)) if finding.level != "ok"]
    assert len(wrong) == 1
    assert wrong[0].level == level and what in wrong[0].what and todo in wrong[0].todo


def test_a_torch_for_a_newer_minor_version_of_cuda_than_the_drivers_is_fine():
    """Within a major version of CUDA an older driver serves."""
    found = findings(replace(HEALTHY, device=None, torch_cuda="12.9", driver_cuda="12.4", torch_error="hidden"))
    assert not any("built for" in finding.what for finding in found if finding.level != "ok")


@pytest.mark.parametrize(
    "smi, proc, found",
    [
        (None, None, (None, None, None)),
        (
            "| NVIDIA-SMI 550.163.01   Driver Version: 550.163.01   CUDA Version: 12.4     |",
            None,
            ("550.163.01", "12.4", None),
        ),
        (
            "| NVIDIA-SMI 595.58.03  Driver Version: 595.58.03  CUDA UMD Version: 13.2 |",
            None,
            ("595.58.03", "13.2", None),
        ),
        (
            None,
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.163.01  Tue Apr  8 12:41:17 2025\nGCC version: 12.3",
            ("550.163.01", None, None),
        ),
        (
            None,
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.126.09  Release Build",
            ("580.126.09", None, None),
        ),
        (
            "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.9",
            None,
            (None, None, "Failed to initialize NVML: Driver/library version mismatch"),
        ),
    ],
)
def test_the_driver_is_read_from_what_it_says(smi, proc, found):
    assert driver_of(smi, proc) == found


def test_the_floors_are_those_of_the_package():
    assert FLOORS.items() <= needed().items()
    assert "ruff" not in needed()  # a developer's


def test_nf4_is_tried_for_real():
    error, apart = nf4_on(HOST)
    assert 0.05 < error < doctoring.NF4_ERROR and apart == 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctoring, "quantize", lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel\nmore")))
        assert nf4_on(HOST) == "no kernel"


def test_this_machine_is_looked_at(tmp_path):
    facts = look(tmp_path / "not there yet")
    assert facts.versions["torch"] == torch.__version__ and facts.floors == needed()
    assert isinstance(facts.nf4, tuple) and 0 < facts.ram_free <= facts.ram and facts.disk_free > 0
    assert (facts.device is None) == (not torch.accelerator.is_available())


def test_the_screen_has_the_machine_what_it_trains_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ill = replace(HEALTHY, disk_free=GIB)
    rates = Rates(flops=2.5e13, memory=3e11, bus=1.2e10, disk=3.1e9)
    text = doctor(tmp_path, measured=rates, largest=lambda machine: f"8B on {machine.name}", facts=ill)
    lines = text.splitlines()
    assert text.isascii() and len(lines) < 25 and max(map(len, lines)) <= 100
    assert lines[1].startswith("trains") and "8B on" in lines[1]
    assert "25 TFLOP/s, memory 300 GB/s" in text and "disk 3.1 GB/s" in text and "not measured" not in text
    at = next(i for i, line in enumerate(lines) if line.startswith("PROBLEM"))
    assert "1.0 GiB free" in lines[at] and lines[at + 1].strip().startswith("-> make room")
    assert "not measured" in doctor(tmp_path, facts=HEALTHY)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
def test_nf4_on_an_accelerator_is_the_cpus():
    error, apart = nf4_on(torch.accelerator.current_accelerator())
    assert error < doctoring.NF4_ERROR and apart < doctoring.NF4_APART
