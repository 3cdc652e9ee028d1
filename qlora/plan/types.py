"""What a plan is made of: the machine, what a step takes there, and what was decided.

Only facts and their names; who makes them is elsewhere: `simulate` the usage, `seconds` the time, `solve` the choice,
`plan` the text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PHASES = ("prologue", "forward", "turn", "backward", "optimizer")  # of a step, in their order

Work = Counter[tuple[int, int]]  # (FLOPs, bytes read and written) of one operation -> how many there are


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a machine is, as programs reach it; all per second.

    flops        of matrix products in 16 bits, summed in float32
    memory       bytes of the device's memory
    bus          bytes between host memory and device, each way
    disk         bytes read from the disk of the NF4 cache and of activations, several requests at a time
    host_memory  bytes of host memory
    launch       seconds that one operation takes at least
    """

    flops: float
    memory: float
    bus: float = math.inf
    disk: float = math.inf
    host_memory: float = math.inf
    launch: float = 0.0


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run is planned for.

    name        for people: "RTX 4090", "CPU, 2 threads"
    is_cpu      the host computes: there is no device memory apart
    device      bytes of device memory that a run may take: those free, the context of the driver not yet taken off
    device_total  bytes that the device has
    context     bytes that the driver's context and libraries' workspaces take beside torch's allocator
    host        bytes of host memory that a run may take
    disk        bytes free where files go; None: not known
    watts       of the card at work; None: not known
    measured    whether the rates were measured on this machine, or are the card's data
    seconds_ratio, bytes_ratio  measured / predicted, of earlier runs on this machine; None: there was none
    """

    name: str
    is_cpu: bool
    device: int
    device_total: int
    context: int
    host: int
    disk: int | None
    rates: Rates
    watts: float | None = None
    measured: bool = False
    seconds_ratio: float | None = None
    bytes_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """What one part of the step computes and moves.

    work       operations on the device
    host_work  operations on the host
    moved      bytes by way: "host to device", "device to host", "from file", "to file"
    """

    work: Work = field(default_factory=Counter)
    host_work: Work = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Usage:
    """What one optimizer step takes.

    device, host  bytes at the moment when most were held there, by what they are for
    file          bytes that the step has on disk, by what they are for
    moment        when most was held on the device
    slack         bytes that torch's allocator holds beside those, in its segments, at most
    phases        what is computed and moved, by PHASES
    tokens        of the step's micro-batches
    layers        of the model
    order         "layer-major", or "standard" for a model that cannot be cut
    """

    device: dict[str, int]
    host: dict[str, int]
    file: dict[str, int]
    moment: str
    slack: int
    phases: Mapping[str, Phase]
    tokens: int
    layers: int
    order: str = "layer-major"

    @property
    def peak_bytes(self) -> int:
        """Most bytes on the device at one time, as torch counts them allocated."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """Most bytes in host memory at one time, what the program itself needs aside."""
        return sum(self.host.values())

    @property
    def file_bytes(self) -> int:
        """Bytes on disk that the step reads or writes."""
        return sum(self.file.values())

    @property
    def flops(self) -> int:
        """Floating point operations of the step; causal attention counts the half that is computed."""
        return sum(flops * n for phase in self.phases.values() for (flops, _), n in phase.work.items())

    @property
    def moved(self) -> Counter[str]:
        """Bytes of the step by way, as in Phase."""
        return sum((phase.moved for phase in self.phases.values()), Counter[str]())


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of one optimizer step, by phase, and what holds each up.

    by_phase  phase -> seconds
    limit     phase -> "compute", "memory", "bus", "disk" or "host": what it waits for most
    """

    by_phase: dict[str, float]
    limit: dict[str, str]

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.by_phase.values())

    @property
    def limited_by(self) -> str:
        """What most of the step's time is spent on."""
        spent: dict[str, float] = {}
        for phase, seconds in self.by_phase.items():
            spent[self.limit[phase]] = spent.get(self.limit[phase], 0) + seconds
        return max(spent, key=lambda what: spent[what])


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run, and what it would take.

    changes  keys of the recipe's `memory` section that differ from the choice's -> values
    """

    changes: dict[str, Any]
    device_bytes: int
    host_bytes: int
    file_bytes: int
    seconds: float
