"""`qlora doctor`: what this machine can train, and what is wrong with its set-up, in plain words.

First everything is looked at, `look`, which judges nothing; then judged, `findings`, which touches nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Literal

import psutil
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora.errors import HostMemoryError
from qlora.machine import GIB, device_name, pick_device
from qlora.model.nf4 import FourBit, dequantize, quantize
from qlora.model.transfer import host_buffer
from qlora.plan.cards import this_machine
from qlora.plan.measure import existing
from qlora.plan.types import Machine, Rates

SHOWN = ("torch", "transformers", "peft", "bitsandbytes")
NF4_ERROR = 0.11  # mean |error| of randn in NF4 with double quantization stays below: bitsandbytes' own tests
NF4_APART = 0.01  # mean |difference| of two back ends: a value on the border of two codes may go either way
TIGHT_DISK, LOW_DISK = 2 * GIB, 25 * GIB  # bytes; an 8B base is 16 GB to download, 5 as NF4 cache, checkpoints on top
LOW_HOST = 4 * GIB  # bytes; the base is quantized a tensor at a time, of up to 2 GB in 16 bits
LOCKED = 256 << 20  # bytes that are page-locked on trial


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found, not judged.

    versions, floors     package -> the installed version, None: not there; the least that is needed
    elsewhere            where torch comes from, if that is not the virtual environment that runs
    other_environment    the activated virtual environment, if it is not the one that runs
    card                 whether a graphics card of NVIDIA's is in this machine
    driver, driver_cuda  version of NVIDIA's driver, newest CUDA that it serves
    driver_error         what nvidia-smi said instead
    torch_cuda           the CUDA that torch was built for; None: for none
    device               the accelerator that torch computes on; None: the CPU
    torch_error          why torch finds no CUDA device
    bf16                 whether the device multiplies bf16 itself
    nf4                  mean |error| of NF4 there, mean |difference| to the CPU's; or the error that came instead
    lock_error           why memory cannot be page-locked
    ram_free, ram, swap, disk_free  bytes
    """

    versions: Mapping[str, str | None]
    floors: Mapping[str, str]
    elsewhere: str | None
    other_environment: str | None
    card: bool
    driver: str | None
    driver_cuda: str | None
    driver_error: str | None
    torch_cuda: str | None
    device: str | None
    torch_error: str | None
    bf16: bool
    nf4: tuple[float, float] | str
    lock_error: str | None
    ram_free: int
    ram: int
    swap: int
    disk_free: int


@dataclass(frozen=True, slots=True)
class Finding:
    """level: how bad it is; what: the state of a thing; todo: how to mend it."""

    level: Literal["ok", "warning", "problem"]
    what: str
    todo: str = ""


def doctor(
    directory: Path,
    measured: Rates | None = None,
    largest: Callable[[Machine], str] | None = None,
    facts: Facts | None = None,
) -> str:
    """What this machine can train and what is wrong with it: one screen.

    directory  where the caches and outputs of runs go
    measured   rates from just now
    largest    says in a few words what a machine can train; it is given one with those rates
    facts      of another machine, for tests
    """
    notes: list[str] = []
    machine = this_machine(directory, notes.append)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def row(head: str, text: str) -> None:
        table.add_row(Text(head), Text(text))

    memory = f"{machine.device / GIB:.1f} of {machine.device_total / GIB:.1f} GiB for a run"
    row("machine", f"{machine.name}: {memory}" + ("" if machine.is_cpu else f", {machine.host / GIB:.1f} GiB of host"))
    if measured is not None:
        machine = replace(machine, rates=measured, measured=True)
    row("trains", "`qlora plan RECIPE` says what fits, and how fast it is" if largest is None else largest(machine))
    rates = machine.rates
    speeds = (("disk", rates.disk),) if machine.is_cpu else (("bus", rates.bus), ("disk", rates.disk))
    row(
        "rates",
        f"{rates.flops / 1e12:.3g} TFLOP/s, memory {rates.memory / 1e9:.0f} GB/s, "
        + ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in speeds)
        + ("" if machine.measured else "; not measured: `qlora doctor --measure`"),
    )
    row("", "")
    for finding in findings(facts or look(directory)):
        row(finding.level.upper() if finding.level == "problem" else finding.level, finding.what)
        if finding.todo:
            row("", f"-> {finding.todo}")
    for note in notes:
        row("note", note)
    out = StringIO()
    Console(file=out, width=100, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def findings(facts: Facts) -> Iterator[Finding]:
    """Judge every fact."""
    yield _accelerator(facts)
    if not facts.bf16:
        yield Finding("warning", f"{facts.device} only emulates bf16, slowly", "train with model.dtype: float32")
    where = facts.device or "the CPU"
    if isinstance(facts.nf4, str):
        mend = "update bitsandbytes; its release notes name the CUDA versions and cards that it serves"
        yield Finding("problem", f"bitsandbytes does not work on {where}: {facts.nf4}", mend)
    elif not (facts.nf4[0] < NF4_ERROR and facts.nf4[1] < NF4_APART):
        wrong = f"NF4 is wrong on {where}: off by {facts.nf4[0]:.3f}, from the CPU's by {facts.nf4[1]:.3f}"
        yield Finding("problem", wrong, "update bitsandbytes and the driver; do not train on this")
    else:
        yield Finding("ok", f"bitsandbytes: NF4 works on {where}")
    if facts.lock_error:
        mend = "raise `memory` in .wslconfig (WSL), `ulimit -l` (elsewhere), or keep all on the device"
        yield Finding("warning", f"host memory cannot be page-locked: {facts.lock_error}", mend)
    yield from _packages(facts)
    level = "problem" if facts.disk_free < TIGHT_DISK else "warning" if facts.disk_free < LOW_DISK else "ok"
    mend = "" if level == "ok" else "make room, or move them: memory.nf4_cache_dir, training.output_dir, HF_HOME"
    yield Finding(level, f"disk: {facts.disk_free / GIB:.1f} GiB free where caches and outputs go", mend)
    low = facts.ram_free < LOW_HOST
    free, swap = f"{facts.ram_free / GIB:.1f} of {facts.ram / GIB:.1f} GiB free", f"{facts.swap / GIB:.1f} of swap"
    mend = "close programs: large tensors pass through it when a base is loaded" if low else ""
    yield Finding("warning" if low else "ok", f"host memory: {free}, {swap}", mend)


def _accelerator(facts: Facts) -> Finding:
    built, serves = facts.torch_cuda, facts.driver_cuda
    if facts.device:
        driver = f", driver {facts.driver}" if facts.driver else ""
        return Finding("ok", f"{facts.device}{driver}" + (f", torch for CUDA {built}" if built else ""))
    if facts.driver_error:
        mend = "restart the machine: after an update the old driver runs until then; else install the driver anew"
        return Finding("problem", f"NVIDIA's driver does not answer: {facts.driver_error}", mend)
    if facts.driver is None and facts.card:
        return Finding("problem", "there is an NVIDIA card and no driver", "install NVIDIA's driver, then restart")
    if facts.driver is None:
        mend = "CPU training is exact and slow; `qlora plan --card` plans for other machines"
        return Finding("warning", "no accelerator: training runs on the CPU", mend)
    if built is None:
        mend = f"install a torch built for CUDA{f' {serves} or older' if serves else ''}"
        return Finding("problem", f"driver {facts.driver} is there, and this torch was built without CUDA", mend)
    if serves and _numbers(built)[0] > _numbers(serves)[0]:  # within a major version drivers serve newer minors
        mend = f"update the driver, or install a torch built for CUDA {_numbers(serves)[0]}"
        return Finding("problem", f"torch was built for CUDA {built}; driver {facts.driver} ends at {serves}", mend)
    why = facts.torch_error or "no reason given"
    mend = "is CUDA_VISIBLE_DEVICES empty? is a container started without its GPUs?"
    return Finding("problem", f"driver {facts.driver} is there, and torch finds no card: {why}", mend)


def _packages(facts: Facts) -> Iterator[Finding]:
    if facts.other_environment:
        mend = f"start qlora with that one's Python, or `deactivate`; this one is {sys.prefix}"
        yield Finding("warning", f"{facts.other_environment} is activated, and another environment runs", mend)
    if facts.elsewhere:
        mend = "an old torch may shadow the right one: remove it there, or set PYTHONNOUSERSITE=1"
        yield Finding("warning", f"torch comes from outside the virtual environment: {facts.elsewhere}", mend)
    old = False
    for name, floor in facts.floors.items():
        version = facts.versions.get(name)
        if version is None or _numbers(version) < _numbers(floor):
            old = True
            mend = f'pip install "{name}>={floor}"'
            yield Finding("problem", f"{name} {version or 'is missing'}: {floor} is needed", mend)
    if not old:
        shown = ", ".join(f"{name} {facts.versions.get(name)}" for name in SHOWN)
        yield Finding("ok", f"Python {platform.python_version()}, {shown}")


# Looking


def look(directory: Path) -> Facts:
    """Find out everything that there is to judge; takes seconds where a driver has to wake up."""
    device, error = pick_device(), None
    is_cpu, cuda = device.type == "cpu", device.type == "cuda"
    if is_cpu and torch.version.cuda:
        try:
            torch.cuda.init()
        except RuntimeError as reason:
            error = str(reason).splitlines()[0]
    driver, driver_cuda, driver_error = driver_of(_nvidia_smi(), _text(Path("/proc/driver/nvidia/version")))
    floors = needed()
    home = Path(torch.__file__).parent
    inside = sys.prefix == sys.base_prefix or home.is_relative_to(sys.prefix)
    activated = os.environ.get("VIRTUAL_ENV")
    memory = psutil.virtual_memory()
    return Facts(
        versions={name: _installed(name) for name in floors},
        floors=floors,
        elsewhere=None if inside else str(home),
        other_environment=activated if activated and Path(activated).resolve() != Path(sys.prefix).resolve() else None,
        card=any(_text(file) == "0x10de" for file in Path("/sys/bus/pci/devices").glob("*/vendor")),
        driver=driver,
        driver_cuda=driver_cuda,
        driver_error=driver_error,
        torch_cuda=torch.version.cuda,
        device=None if is_cpu else device_name(device),
        torch_error=error,
        bf16=torch.cuda.is_bf16_supported(including_emulation=False) if cuda else True,
        nf4=nf4_on(device),
        lock_error=_lock_error(device) if cuda else None,
        ram_free=memory.available,
        ram=memory.total,
        swap=psutil.swap_memory().total,
        disk_free=shutil.disk_usage(existing(directory)).free,
    )


def nf4_on(device: torch.device) -> tuple[float, float] | str:
    """Quantize [64, 64] to NF4 there and back: mean |error|, mean |difference| to the CPU; or why it cannot be."""
    four_bit = FourBit(compute_dtype=torch.float32)
    dense = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    try:
        there, here = (dequantize(quantize(x, four_bit), x.shape, four_bit).cpu() for x in (dense.to(device), dense))
    except (RuntimeError, NotImplementedError, AttributeError) as error:  # what a missing back end comes out as
        return (str(error) or type(error).__name__).splitlines()[0]
    return (there - dense).abs().mean().item(), (there - here).abs().mean().item()


def driver_of(smi: str | None, proc: str | None) -> tuple[str | None, str | None, str | None]:
    """Version of NVIDIA's driver, the CUDA it serves, what is wrong; from what nvidia-smi and the kernel say."""
    kernel = re.search(r"Module\b.*?\s(\d+\.[\d.]+)", proc or "")
    version = re.search(r"Driver Version:\s*(\d[\d.]*)", smi or "")
    if version is None:
        failed = smi.strip().splitlines()[0] if smi and smi.strip() else None
        return kernel[1] if kernel else None, None, failed
    cuda = re.search(r"CUDA(?: \w+)? Version:\s*(\d[\d.]*)", smi or "")
    return version[1], cuda[1] if cuda else None, None


def needed() -> dict[str, str]:
    """The least version of each package that this one needs, from its metadata, or its pyproject.toml."""
    try:
        lines = importlib.metadata.requires("qlora-trainer") or []
    except importlib.metadata.PackageNotFoundError:
        text = _text(Path(__file__).parents[2] / "pyproject.toml")
        lines = tomllib.loads(text)["project"]["dependencies"] if text else []
    found = (re.match(r"([\w.-]+)\s*>=\s*([\d.]+)\s*$", line) for line in lines)
    return {match[1]: match[2] for match in found if match}  # what an extra needs has more on its line


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return done.stdout + done.stderr or f"nvidia-smi: exit status {done.returncode}"


def _lock_error(device: torch.device) -> str | None:
    try:
        host_buffer(LOCKED, device)
    except HostMemoryError as error:
        return str(error).splitlines()[0]
    return None


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])
