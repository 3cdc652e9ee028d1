"""What this machine really does: its rates, tried out, and how far plans were off; both kept between runs.

    <cache>/machine.json    rates and the ratios of the latest runs, by machine

The file only makes plans better: one that cannot be read counts as absent, one that cannot be written is not kept, and
either is said.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated, cast

import psutil
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from qlora.errors import HostMemoryError, MachineError
from qlora.machine import GIB, device_name, free_bytes, give_back_memory
from qlora.model.cache import cache_home
from qlora.model.homes import READERS
from qlora.model.shards import Layout, ShardReader, ShardWriter
from qlora.model.transfer import HOST, Lane, host_buffer
from qlora.plan.types import Rates

BUDGET = 14.0  # seconds of a whole measurement; a part may go over its share by one try
SHARD = 128 << 20  # bytes; about a layer of an 8B base
SHARDS = 4
USUAL_DISK = 3.5e9  # bytes a second: the slower of NVMe drives, read directly (public receipts: 3.5 to 5.7e9)
RUNS = 8  # latest runs that calibrate: old ones were other versions of drivers and of this program
BELIEVED = (0.1, 10.0)  # a ratio beyond is a mistake (a laptop that slept), not a property of the machine

Say = Callable[[str], object]


def measure(device: torch.device, directory: Path, say: Say, budget: float = BUDGET) -> Rates:
    """Try out every rate of the machine; under 20 s.

    directory  on the disk that is to be tried; a temporary directory in it holds up to 512 MiB meanwhile
    say        is told what could not be measured, and what stands in its place
    budget     seconds, shared by the parts

    Raises MachineError where the device's memory is taken.
    """
    try:
        rates = _measure(device, directory, say, budget)
    except torch.OutOfMemoryError as error:
        free = free_bytes(device) / GIB
        raise MachineError(f"measuring takes 1 GiB of {device}, {free:.2f} are free: close what uses it") from error
    give_back_memory(device)
    return rates


def _measure(device: torch.device, directory: Path, say: Say, budget: float) -> Rates:
    host_memory = copying(HOST, 0.1 * budget)
    return Rates(
        flops=multiplying(device, 0.3 * budget),
        memory=host_memory if device.type == "cpu" else copying(device, 0.05 * budget),
        bus=math.inf if device.type == "cpu" else crossing(device, say, 0.1 * budget),
        disk=reading(directory, say, 0.4 * budget),
        host_memory=host_memory,
        launch=launching(device, 0.05 * budget),
    )


def quick(device: torch.device) -> Rates:
    """A rough idea of a machine that nothing is known of, in under a second; the disk's rate is a usual one."""
    memory = copying(device, 0.1)
    host_memory = memory if device.type == "cpu" else copying(HOST, 0.1)
    bus = math.inf if device.type == "cpu" else crossing(device, lambda _: None, 0.1)
    return Rates(multiplying(device, 0.3), memory, bus, USUAL_DISK, host_memory, launching(device, 0.05))


def multiplying(device: torch.device, budget: float) -> float:
    """FLOP/s of bf16 matrix products, at the best of the sizes [n, n] that fit into the budget."""
    end, best = time.perf_counter() + budget, 0.0
    for n in (512, 1024, 2048, 4096, 8192):
        if best and 8 * 2 * n**3 / best > end - time.perf_counter():  # too few tries to trust
            break
        a, b, out = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(3))
        best = max(best, 2 * n**3 / _seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, budget / 4))
    return best


def copying(device: torch.device, budget: float) -> float:
    """Bytes a second that one memory reads and writes in a copy."""
    nbytes = min(256 << 20, free_bytes(device) // 8 or 64 << 20)
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    to = torch.ones_like(source)
    return 2 * nbytes / _seconds(lambda: to.copy_(source), device, budget)


def crossing(device: torch.device, say: Say, budget: float) -> float:
    """Bytes a second between page-locked host memory and the device, on the slower way of the two."""
    nbytes = 256 << 20
    try:
        host = host_buffer(nbytes, device)
    except HostMemoryError as error:
        say(f"the bus is measured with pageable memory, which is slower: {error}")
        host = torch.empty(nbytes, dtype=torch.uint8)
    there, lane = torch.empty(nbytes, dtype=torch.uint8, device=device), Lane(device)
    up = _seconds(lambda: lane.copy(there, host), device, budget / 2)
    down = _seconds(lambda: lane.copy(host, there), device, budget / 2)
    return nbytes / max(up, down)


def reading(directory: Path, say: Say, budget: float) -> float:
    """Bytes a second of shards that are read as training reads them: directly, by several readers."""
    directory = existing(directory)
    count = min(SHARDS, shutil.disk_usage(directory).free // (4 * SHARD))  # a full disk is slow, and not ours to fill
    usual = f"a usual {USUAL_DISK / 1e9} GB/s stands for it"
    if not count:
        say(f"{directory}: too little room to measure the disk; {usual}")
        return USUAL_DISK
    end = time.perf_counter() + 0.6 * budget
    buffer = host_buffer(SHARD, HOST)
    buffer.random_()  # zeros would be compressed on the way
    layout, seconds = Layout.of({"x": (torch.uint8, (SHARD,))}), list[float]()
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".qlora-measure-") as place:
            records = []
            while len(records) < count and (not records or time.perf_counter() < end):
                writer = ShardWriter(Path(place) / f"{len(records)}.safetensors", layout)
                writer.write("x", buffer)
                records.append(writer.close())
            end = time.perf_counter() + 0.4 * budget
            with ThreadPoolExecutor(READERS) as readers:
                while not seconds or (len(seconds) < 2 * count and time.perf_counter() < end):
                    record = records[len(seconds) % len(records)]
                    checksums = {"": record["header_crc32"]}
                    reader = ShardReader(Path(place) / record["file"], layout, record["data_start"], checksums)
                    start = time.perf_counter()
                    reader.read_into(buffer, readers)
                    seconds.append(time.perf_counter() - start)
                    reader.close()
            if not reader.direct:
                say(f"{directory}: reads go through the page cache here; the disk may be slower than it seems")
    except (MachineError, OSError) as error:
        say(f"the disk cannot be measured, {usual}: {error}")
        return USUAL_DISK
    return SHARD / statistics.median(seconds)


def launching(device: torch.device, budget: float) -> float:
    """Seconds that an operation on next to nothing takes, one after another."""
    x = torch.zeros(8, device=device)
    return _seconds(lambda: x.add_(1), device, budget)


def _seconds(once: Callable[[], object], device: torch.device, budget: float) -> float:
    """Median seconds of a call, of up to 7 tries; a short one is repeated within a try."""

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            once()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return (time.perf_counter() - start) / times

    end = time.perf_counter() + budget
    run(1)  # libraries load and choose their kernels at the first
    repeats = max(1, min(1000, math.ceil(0.02 / max(run(1), 1e-9))))
    tries = [run(repeats)]
    while len(tries) < 7 and time.perf_counter() + repeats * tries[-1] < end:
        tries.append(run(repeats))
    return statistics.median(tries)


def existing(directory: Path) -> Path:
    """The directory, or the nearest above it that is there: the same disk."""
    directory = directory.expanduser().absolute()
    return next(path for path in (directory, *directory.parents) if path.is_dir())


# What is kept

_Ratios = list[Annotated[float, Field(ge=BELIEVED[0], le=BELIEVED[1])]]


def _checked(rates: Rates) -> Rates:
    if not all(rate > 0 for rate in (rates.flops, rates.memory, rates.bus, rates.disk, rates.host_memory)):
        raise ValueError("rates are above 0")
    return rates


class _Kept(BaseModel):
    """Of one machine: the measured rates; measured / predicted of the latest runs, the newest last."""

    model_config = ConfigDict(extra="forbid")
    rates: Annotated[Rates, AfterValidator(_checked)] | None = None
    seconds: _Ratios = []
    bytes: _Ratios = []


_FILE = TypeAdapter(dict[str, _Kept])


def total_bytes(device: torch.device) -> int:
    """Memory that the device has: VRAM, or the host's."""
    if device.type == "cpu":
        return psutil.virtual_memory().total
    return torch.accelerator.get_memory_info(device)[1]


def key_of(device: torch.device) -> str:
    """The name under which a machine's figures are kept."""
    return f"{device_name(device)}, {total_bytes(device)} bytes"


def remember(key: str, rates: Rates, say: Say) -> None:
    """Keep measured rates."""
    _change(key, lambda _: {"rates": rates}, say)


def recall(key: str, say: Say) -> Rates | None:
    """The rates that were measured on this machine; None: there are none."""
    return _read(say).get(key, _Kept()).rates


def calibrate(key: str, seconds_ratio: float | None, bytes_ratio: float | None, say: Say) -> None:
    """Keep how a run came out: measured / predicted, where the prediction was one without calibration; None: not known.

    A ratio that cannot be believed is not kept, and said.
    """
    for name, ratio in (("seconds", seconds_ratio), ("bytes", bytes_ratio)):
        if ratio is None:
            continue
        if BELIEVED[0] <= ratio <= BELIEVED[1]:  # NaN is not
            _change(key, lambda kept, name=name, ratio=ratio: {name: [*getattr(kept, name), ratio][-RUNS:]}, say)
        else:
            say(f"this run's {name}, measured / predicted, are {ratio:g}, which plans do not learn from")


def calibration(key: str, say: Say) -> tuple[float | None, float | None]:
    """Median measured / predicted of the latest runs, of seconds and of bytes; None: there was none."""
    kept = _read(say).get(key, _Kept())
    seconds, nbytes = (statistics.median(ratios) if ratios else None for ratios in (kept.seconds, kept.bytes))
    return seconds, nbytes


def _path() -> Path:
    return cast(Path, cache_home("auto")) / "machine.json"


def _read(say: Say) -> dict[str, _Kept]:
    try:
        return _FILE.validate_json(_path().read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        say(f"{_path()}: cannot be used, so no measured rates and no calibration: {str(error).splitlines()[0]}")
        return {}


def _change(key: str, change: Callable[[_Kept], dict[str, object]], say: Say) -> None:
    path, file = _path(), _read(say)
    kept = file.get(key, _Kept())
    file[key] = kept.model_copy(update=change(kept))
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(_FILE.dump_json(file, indent=1, exclude_defaults=True))
        os.replace(beside, path)
    except OSError as error:
        say(f"{path}: cannot be written, so this is not kept: {error.strerror or error}")
        with suppress(OSError):
            beside.unlink(missing_ok=True)
