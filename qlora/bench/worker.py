"""One method's process: it loads, says what that took, and takes a step whenever it is asked to.

    parent: Order(work, kind), ...                None
    worker: Loaded | Failure, then for each order StepTaken, meters.Counted or Peaks, or Failure, which ends it

Each method has a process of its own, so that nothing of another leaks into its figures.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora.bench.apart import hush
from qlora.bench.results import Loaded, Status
from qlora.bench.work import Setup, Work

if TYPE_CHECKING:
    import torch

STEPS = 32  # of a recipe's rows, before they come again


@dataclass(frozen=True, slots=True)
class Order:
    """What the parent asks for. The first of a work starts from the adapter's first weights, with peaks forgotten.

    step   a timed step
    count  a step that is counted instead; peaks are forgotten
    peaks  what the steps since then held
    """

    work: Work
    kind: Literal["step", "count", "peaks"]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a process ended."""

    status: Status
    error: str
    traceback: str | None = None


def run(pipe: Connection, setup: Setup, directory: Path) -> None:
    """The process. directory: where it may leave files that the next run can use."""
    hush()
    try:
        _serve(pipe, setup, directory)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):  # the parent's, too, who says so
            return
        pipe.send(_failure(error))


def _failure(error: BaseException) -> Failure:
    import torch

    from qlora.errors import HostMemoryError

    kinds = (torch.OutOfMemoryError, HostMemoryError, MemoryError)
    full = any(isinstance(each, kinds) for each in _causes(error))
    line = f"{type(error).__name__}: {error}".partition("\n")[0]
    return Failure("out of memory" if full else "failed", line, traceback.format_exc())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _serve(pipe: Connection, setup: Setup, directory: Path) -> None:
    import torch

    from qlora.bench import meters
    from qlora.bench.methods import batches_of, prepare
    from qlora.machine import GIB, memory_gib
    from qlora.train.checkpoint import Run
    from qlora.train.loop import Loop
    from qlora.train.optim import settle

    device = torch.device("cpu") if setup.device == "cpu" else torch.device(setup.device, 0)
    if setup.vram is not None:
        total = torch.accelerator.get_memory_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, setup.vram * GIB / total), device)
    ready = prepare(setup, directory, device, lambda text: None)
    on_gpu = device.type != "cpu"
    pipe.send(
        Loaded(
            seconds=ready.seconds,
            parameters=ready.base_parameters,
            trained=sum(p.numel() for p in ready.parameters.values()),
            host_peak_gib=meters.host_peak_gib(),
            device_gib=memory_gib(device) if on_gpu else None,
            device_peak_gib=meters.peaks(device).allocated,
            facts=ready.facts,
        )
    )
    stalls, energy = meters.Stalls(device), meters.Energy(device)
    if ready.residency is not None:
        ready.residency.watch = stalls
    # As bytes, which no ledger counts. A full copy of a model is not made: what is trained whole trains on.
    first = {} if setup.method == "full" else {name: _bytes(p) for name, p in ready.parameters.items()}
    work, number, told_apart, steps = None, 0, True, []
    while order := pipe.recv():
        if order.work != work:
            work, number, steps = order.work, 0, []  # dropped before there are others
            _put_back(ready.parameters, first)
            loop = Loop(ready.step, ready.parameters, lambda _: [], ready.config.training, Run(), lambda *_, **__: None)
            settle(loop.optimizer, ready.parameters.values())  # or the first step would hold less than the others
            steps = batches_of(setup, work, ready.vocab, ready.source, STEPS)
            if on_gpu:
                torch.accelerator.empty_cache()
            told_apart = meters.forget_peaks(device)
        if order.kind == "peaks":
            pipe.send(meters.peaks(device, told_apart))
            continue
        batches, number = steps[number % len(steps)], number + 1
        if order.kind == "step":
            pipe.send(meters.timed(loop, ready, batches, number, stalls, energy))
            continue
        pipe.send(meters.counted(loop, ready, batches, number))
        stalls.seconds()  # not this step's
        told_apart = meters.forget_peaks(device)


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()


def _put_back(parameters: Mapping[str, torch.Tensor], first: Mapping[str, bytes]) -> None:
    import torch

    with torch.no_grad():
        for name, kept in first.items():
            tensor = parameters[name]
            tensor.copy_(torch.frombuffer(bytearray(kept), dtype=tensor.dtype).view(tensor.shape))
