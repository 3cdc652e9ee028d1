"""What is read while a step runs: clock, waits for weights, peaks of memory, energy; and one step counted whole.

Counting (a `Ledger` over real tensors) sees every operation and takes time, so the counted step is not timed. All
methods are counted by the same ledger, which asks for nothing of theirs.
"""

from __future__ import annotations

import gc
import importlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.bench.methods import Ready
from qlora.bench.results import Peaks, StepTaken
from qlora.machine import GIB, peak_memory_gib
from qlora.model.batch import Batch
from qlora.model.homes import OnHost
from qlora.model.nf4 import four_bit_weights
from qlora.plan.ledger import Ledger
from qlora.plan.simulate import ADAPTERS, BASE, DENSE, ENDS, GRADIENTS, OPTIMIZER, Watched
from qlora.plan.types import Phase
from qlora.train.loop import Loop
from qlora.train.step import LayerMajor

OTHER = "other"  # category of what stands before the step and belongs to nothing that is known


class Stalls:
    """For how long the computation stood still for want of a layer: entered around each wait.

    The host's own wait says little on an accelerator, ahead of which it runs: there it is events of the device's
    stream, before and behind, between which nothing is computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pairs: list[tuple[Any, Any]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before = self._mark()
        yield
        self._pairs.append((before, self._mark()))

    def _mark(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device))
        return event

    def seconds(self) -> float:
        """Since it was asked last; the device must have come to its end."""
        pairs, self._pairs = self._pairs, []
        if self._device.type == "cpu":
            return sum(behind - before for before, behind in pairs)
        return sum(before.elapsed_time(behind) for before, behind in pairs) / 1000


class Energy:
    """Joules that a card took, where its driver counts them and `pynvml` is installed."""

    def __init__(self, device: torch.device) -> None:
        self._read: Callable[[], int] | None = None
        if device.type != "cuda":
            return
        try:
            nvml = importlib.import_module("pynvml")
        except ModuleNotFoundError:
            return
        try:
            nvml.nvmlInit()
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError:  # cards before Volta do not count
            return
        self._read = lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)

    def joules(self) -> float | None:
        """Since the driver was loaded; None where nobody counts."""
        return None if self._read is None else self._read() / 1000


def synchronize(device: torch.device) -> None:
    """Wait for the device to come to its end."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(loop: Loop, ready: Ready, batches: Sequence[Batch], number: int, stalls: Stalls, energy: Energy) -> StepTaken:
    """One optimizer step, seconds by what they were spent on."""
    device = loop.device
    synchronize(device)
    joules, started = energy.joules(), time.perf_counter()
    here = [batch.to(device) for batch in batches]
    synchronize(device)
    arrived = time.perf_counter()
    result = ready.step(here, number)
    synchronize(device)
    computed = time.perf_counter()
    loop.update(result, here, number)
    synchronize(device)
    ended, spent = time.perf_counter(), energy.joules()
    weights = stalls.seconds()
    return StepTaken(
        seconds=ended - started,
        compute=computed - arrived - weights,
        weights=weights,
        data=arrived - started,
        optimizer=ended - computed,
        loss=result.loss,
        joules=spent - joules if spent is not None and joules is not None else None,
    )


@dataclass(frozen=True, slots=True)
class Counted:
    """What a step held and computed.

    tensors      the most GiB of live storages
    by_category  those, by what they were for; of a method that is not ours nothing is known
    flops        as computed
    model_flops  less what was computed twice; None: not known
    """

    loss: float
    tensors: float
    by_category: dict[str, float]
    flops: float
    model_flops: float | None


def counted(loop: Loop, ready: Ready, batches: Sequence[Batch], number: int) -> Counted:
    """One optimizer step under a ledger."""
    device, ledger = loop.device, Ledger()
    here = [batch.to(device) for batch in batches]
    _name_what_stands(ledger, ready, loop)
    own = ready.step if isinstance(ready.step, LayerMajor) else None
    step = ready.step if own is None else Watched.of(own, ledger)
    with ledger:
        ledger.start()
        result = step(here, number)
        for parameter in loop.parameters.values():
            ledger.name(parameter.grad, GRADIENTS)
        ledger.at = ("optimizer", 0)
        loop.update(result, here, number)
    peak = ledger.peak(device)[1]
    flops = {at: _flops(phase) for at, phase in ledger.phases.items()}
    total = sum(flops.values())
    twice = None
    if own is not None and not ready.config.memory.layer_tile_tokens:  # tiles compute again inside a layer
        again = len(own.blocks) - 1 - own.layers_kept
        twice = sum(flops.get(("forward", i), 0.0) for i in range(again))
    return Counted(
        loss=result.loss,
        tensors=peak.nbytes / GIB,
        by_category=_named(peak.by_category, ready.config.method) if own else {},
        flops=total,
        model_flops=None if twice is None else total - twice,
    )


def _named(held: Mapping[str, int], method: str) -> dict[str, float]:
    """GiB by category; what is trained is an adapter where there is one."""
    names = {ADAPTERS: "trained weights"} if method == "full" else {}
    return {names.get(category, category): nbytes / GIB for category, nbytes in held.items() if nbytes}


def _flops(phase: Phase) -> float:
    return float(sum(n * times for work in (phase.work, phase.host_work) for (n, _), times in work.items()))


def _name_what_stands(ledger: Ledger, ready: Ready, loop: Loop) -> None:
    """Make every tensor that is alive known to the ledger, whoever holds it."""
    gc.collect()
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.device == loop.device and each.layout == torch.strided:
            ledger.name(each, OTHER)
    for tensor in (*ready.model.parameters(), *ready.model.buffers()):
        ledger.name(tensor, ADAPTERS if tensor.requires_grad else ENDS)
    for weight in four_bit_weights(ready.model):
        for part in [weight.home.buffer] if isinstance(weight.home, OnHost) else (weight.held or {}).values():
            ledger.name(part, BASE)
    if ready.residency is not None:
        for buffer in ready.residency.buffers():
            ledger.name(buffer, DENSE)
    for state in loop.optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                ledger.name(value, OPTIMIZER)


def host_peak_gib() -> float:
    """The most GiB of this process that were resident since the last `forget_peaks`."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: a new process inherits in it what its parent held when it called exec.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024 / GIB
    return peak_memory_gib(torch.device("cpu"))


def forget_peaks(device: torch.device) -> bool:
    """Count the peaks from here on; False where the system cannot, so that the host's has the load's in it."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    except OSError:
        return False
    return True


def peaks(device: torch.device, told_apart: bool = True) -> Peaks:
    """The most that was held since the last `forget_peaks`, which said whether the host's can be told apart."""
    on_gpu = device.type != "cpu"
    return Peaks(
        allocated=torch.accelerator.max_memory_allocated(device) / GIB if on_gpu else None,
        reserved=torch.accelerator.max_memory_reserved(device) / GIB if on_gpu else None,
        host=host_peak_gib(),
        host_told_apart=told_apart,
    )
