"""Graphics cards as data, and machines made of them: one that is described by hand, and the one that this is.

The figures are the vendor's. What programs reach of them is a fraction, named here; `measure` finds the truth.
"""

from __future__ import annotations

import difflib
import math
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qlora.errors import MachineError
from qlora.machine import GIB, device_name, free_bytes, pick_device
from qlora.model.transfer import HOST
from qlora.plan.measure import USUAL_DISK, Say, calibration, existing, key_of, quick, recall, total_bytes
from qlora.plan.types import Machine, Rates

# Of the card's figures, what programs reach.
OF_PEAK = 0.7  # of dense peak: torchtune's 8B QLoRA on a 4090, 2413 tokens/s of 46.7 GFLOP each, is 68%
OF_MEMORY = 0.85  # of the memory's bandwidth, in long copies and elementwise kernels
OF_PCIE = 0.8  # of a link's bytes: the rest are packets' headers. 25 of 31.5 GB/s is what copies on 4.0 x16 reach
USUAL_HOST_MEMORY = 40e9  # bytes a second of two channels of DDR4 or slow DDR5, read and written in a copy
USUAL_LAUNCH = 8e-6  # seconds from Python to a kernel

# What a run cannot have.
CONTEXT = 500_000_000  # bytes: the CUDA context with kernels that are loaded when needed, 0.3 to 0.4 GB; cuBLAS
CONTEXT_AT_ONCE = 290_000_000  # of it, from the first call on (287 MB: pytorch/pytorch#86509); the rest comes at work
# Bytes, and a share of the total, that the driver holds: torch's out-of-memory errors report 23.65 of 23.99 GiB on a
# 4090, 11.75 of 12 on a 3060, 31.37 of 31.84 on a 5090, 79.25 of 80 on an A100.
DRIVER, DRIVER_SHARE = 0.25 * GIB, 0.007
DESKTOP = 0.3 * GIB  # bytes of a screen and its compositor. A browser takes more: close it, or say --vram
HOST_HELD = 4 * GIB  # bytes of a whole host: half the system with its desktop, half Python, torch and CUDA's libraries
HOST_SPARE = 1 * GIB  # bytes of free host memory left alone: tokens, buffers of loading and saving. Libraries are in
USUAL_HOST_GIB = 32.0


def pcie(generation: int, lanes: int) -> float:
    """GB/s that copies reach one way over a link, where the board is of the card's generation.

    A lane carries 8 GT/s at 3.0 and doubles with each generation; 128 of 130 bits are data; OF_PCIE of those are.
    """
    return round(8 * 2 ** (generation - 3) * 128 / 130 / 8 * lanes * OF_PCIE, 1)


@dataclass(frozen=True, slots=True)
class Card:
    """A graphics card.

    name         for people: "RTX 4090"; two cards that differ in memory name it: "A100 80 GB"
    vram_gib     memory, as it is sold
    mib          memory, as the driver reports it (nvidia-smi)
    tflops       10^12 FLOP/s of dense bf16 matrix products that are summed in fp32
    memory_gb_s  10^9 bytes/s of its memory
    pcie_gb_s    10^9 bytes/s to and from the host, one way, as copies reach it; see `pcie`
    watts        rated power of the board
    source       where the figures are from
    """

    name: str
    vram_gib: float
    mib: int
    tflops: float
    memory_gb_s: float
    pcie_gb_s: float
    watts: float
    source: str

    @property
    def key(self) -> str:
        """What one writes after --card: "rtx4090", "a100-80gb"."""
        return self.name.lower().replace(" gb", "gb").replace(" ", "" if self.has_desktop else "-")

    @property
    def has_desktop(self) -> bool:
        """Whether a screen hangs on it, usually."""
        return self.name.startswith("RTX")

    @property
    def rates(self) -> Rates:
        """What programs reach of the figures."""
        return Rates(
            flops=self.tflops * 1e12 * OF_PEAK,
            memory=self.memory_gb_s * 1e9 * OF_MEMORY,
            bus=self.pcie_gb_s * 1e9,
            disk=USUAL_DISK,
            host_memory=USUAL_HOST_MEMORY,
            launch=USUAL_LAUNCH,
        )

    def with_memory(self, total: int) -> Card:
        """The same card with another amount of memory, in bytes."""
        gib = round(total / GIB, 1)
        return replace(self, name=f"{self.name} with {gib:g} GiB", vram_gib=gib, mib=total >> 20)


# Matrix FLOP/s. GeForce cards sum bf16 in fp32 at half the rate of sums in fp16: 512 FLOP a cycle and SM at the boost
# clock. Their product pages count AI TOPS with sparsity, in the narrowest type: FP16 in the 30 series, which is 4 times
# as fast, FP8 in the 40 (8 times), FP4 in the 50 (16 times). Data sheets' figures with sparsity are halved.
_AMPERE = "product page: tensor TFLOPS / 4; NVIDIA Ampere GA102 GPU architecture whitepaper"
_ADA = "product page: AI TOPS / 8; NVIDIA Ada GPU architecture whitepaper"
_BLACKWELL = "product page: AI TOPS / 16; NVIDIA RTX Blackwell GPU architecture whitepaper"
_SHEET = "NVIDIA data sheet of the card"
_4X16, _4X8, _5X16, _5X8 = pcie(4, 16), pcie(4, 8), pcie(5, 16), pcie(5, 8)
CARDS = (
    Card("RTX 3060", 12, 12288, 25.5, 360, _4X16, 170, _AMPERE),
    Card("RTX 3060 Ti", 8, 8192, 32.4, 448, _4X16, 200, _AMPERE),
    Card("RTX 3070", 8, 8192, 40.6, 448, _4X16, 220, _AMPERE),
    Card("RTX 3070 Ti", 8, 8192, 43.5, 608, _4X16, 290, _AMPERE),
    Card("RTX 3080", 10, 10240, 59.5, 760, _4X16, 320, _AMPERE),
    Card("RTX 3080 Ti", 12, 12288, 68.2, 912, _4X16, 350, _AMPERE),
    Card("RTX 3090", 24, 24576, 71.0, 936, _4X16, 350, _AMPERE),
    Card("RTX 3090 Ti", 24, 24564, 80.0, 1008, _4X16, 450, _AMPERE),
    Card("RTX 4060", 8, 8188, 30.2, 272, _4X8, 115, _ADA),
    Card("RTX 4060 Ti", 16, 16380, 44.1, 288, _4X8, 165, _ADA),
    Card("RTX 4070", 12, 12282, 58.3, 504, _4X16, 200, _ADA),
    Card("RTX 4070 Super", 12, 12282, 71.0, 504, _4X16, 220, _ADA),
    Card("RTX 4070 Ti", 12, 12282, 80.2, 504, _4X16, 285, _ADA),
    Card("RTX 4070 Ti Super", 16, 16376, 88.2, 672, _4X16, 285, _ADA),
    Card("RTX 4080", 16, 16376, 97.5, 717, _4X16, 320, _ADA),
    Card("RTX 4080 Super", 16, 16376, 104.4, 736, _4X16, 320, _ADA),
    Card("RTX 4090", 24, 24564, 165.2, 1008, _4X16, 450, _ADA),
    Card("RTX 5060", 8, 8151, 38.4, 448, _5X8, 145, _BLACKWELL),
    Card("RTX 5060 Ti", 16, 16311, 47.4, 448, _5X8, 180, _BLACKWELL),
    Card("RTX 5070", 12, 12227, 61.7, 672, _5X16, 250, _BLACKWELL),
    Card("RTX 5070 Ti", 16, 16303, 87.9, 896, _5X16, 300, _BLACKWELL),
    Card("RTX 5080", 16, 16303, 112.6, 960, _5X16, 360, _BLACKWELL),
    Card("RTX 5090", 32, 32607, 209.5, 1792, _5X16, 575, _BLACKWELL),
    Card("RTX A6000", 48, 49140, 154.8, 768, _4X16, 300, _SHEET),
    Card("A10", 24, 23028, 125.0, 600, _4X16, 150, _SHEET),
    Card("A100 40 GB", 40, 40960, 312.0, 1555, _4X16, 400, _SHEET),
    Card("A100 80 GB", 80, 81920, 312.0, 2039, _4X16, 400, _SHEET),
    Card("L4", 24, 23034, 121.0, 300, _4X16, 72, _SHEET),
    Card("L40S", 48, 46068, 362.0, 864, _4X16, 350, _SHEET),
    Card("H100", 80, 81559, 989.0, 3350, _5X16, 700, _SHEET),
    Card("H100 PCIe", 80, 81559, 756.0, 2000, _5X16, 350, _SHEET),
    Card("H200", 141, 143771, 989.0, 4800, _5X16, 700, _SHEET),
)


def find(name: str) -> Card:
    """The card of a name, however it is written: "rtx4090", "NVIDIA GeForce RTX 4090", "4060 ti", "a100-80gb".

    Raises MachineError with the nearest names where it is none's, or several cards'.
    """
    wanted = _bare(name)
    found = [card for card in CARDS if wanted in (_model(card), _model(card) + f"{card.vram_gib:g}")]
    if len(found) == 1:
        return found[0]
    keys = {spelling: card.key for card in CARDS for spelling in (_model(card), card.key)}
    near = difflib.get_close_matches(wanted, keys, n=6, cutoff=0.5)
    nearest = [card.key for card in found] or list(dict.fromkeys(keys[spelling] for spelling in near))[:3]
    what = "which card is meant by" if found else "no figures of a card named"
    raise MachineError(
        f"{what} `{name}`\n"
        f"  {'did you mean' if nearest else 'there are'} {', '.join(nearest or [card.key for card in CARDS])}?\n"
        "  --vram GIB plans for a card by its memory alone"
    )


def identify(device_name: str, total: int) -> Card | None:
    """The card that torch calls `device_name` and that has `total` bytes; None: an unknown one, or a laptop's.

    One that is sold with several amounts of memory gets the amount that it has.
    """
    name = re.sub(r"\d+\s*gb", " ", device_name.lower())
    cards = [card for card in CARDS if _model(card) == _bare(name)]
    cards = cards or [card for card in CARDS if _model(card) == _bare(name.replace("pcie", ""))]
    if not cards:
        return None
    card = min(cards, key=lambda card: abs(card.vram_gib * GIB - total))
    return card if abs(card.vram_gib * GIB / total - 1) < 0.1 else card.with_memory(total)


def _bare(name: str) -> str:
    """A name without what people leave out: of "NVIDIA GeForce RTX 4060 Ti 16 GB" it is "4060ti16"."""
    name = re.sub(r"nvidia|geforce|sxm\d*|hbm\d*e?|(?<=\d)\s*gi?b\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]", "", name).removeprefix("rtx")


def _model(card: Card) -> str:
    return _bare(re.sub(r"\d+ GB", "", card.name))


def machine_for(card: str | None, vram_gib: float | None = None, host_gib: float | None = None) -> Machine:
    """A machine that is described by hand, for which a plan must not depend on this one.

    card      as `find` takes it; with `vram_gib`, that card with another amount of memory
    vram_gib  alone: the smallest cards with that much, of these the slowest one's rates
    host_gib  memory of the host; None: 32

    Raises MachineError where the card is unknown, or neither it nor its memory is given.
    """
    for name, gib in (("--vram", vram_gib), ("--host-ram", host_gib)):
        if gib is not None and not 0 < gib < math.inf:
            raise MachineError(f"{name} must be a number of GiB above 0, got {gib:g}")
    if card is not None:
        figures = find(card)
        total = figures.mib << 20 if vram_gib is None else int(vram_gib * GIB)
        name = (figures if vram_gib is None else figures.with_memory(total)).name
    elif vram_gib is not None:
        figures, total = _stand_in(vram_gib), int(vram_gib * GIB)
        name = f"a card with {vram_gib:g} GiB (rates of {figures.name})"
    else:
        raise MachineError("a machine is described by a card, its memory, or both: --card rtx4090, --vram 24")
    held = DRIVER + DRIVER_SHARE * total + (DESKTOP if figures.has_desktop else 0)
    return Machine(
        name=name,
        is_cpu=False,
        device=max(0, int(total - held)),
        device_total=total,
        context=CONTEXT,
        host=max(0, int((host_gib or USUAL_HOST_GIB) * GIB - HOST_HELD)),
        disk=None,
        rates=figures.rates,
        watts=figures.watts,
    )


def _stand_in(gib: float) -> Card:
    """The slowest of the smallest cards with that much memory, give or take what a driver keeps."""
    enough = [card for card in CARDS if card.vram_gib >= 0.95 * gib] or [max(CARDS, key=lambda card: card.vram_gib)]
    return min(enough, key=lambda card: (card.vram_gib, card.tflops))


def this_machine(directory: Path, say: Say = print) -> Machine:
    """The machine that this is, with what is free now.

    directory  where the run's files go
    say        is told what is wrong with the kept measurements

    Rates are those that `qlora doctor --measure` kept; else the card's data; else, on a CPU or an unknown card, tried
    out roughly in under a second, which does not count as measured.
    """
    device = pick_device()
    name, total, key = device_name(device), total_bytes(device), key_of(device)
    is_cpu = device.type == "cpu"
    card = None if is_cpu else identify(name, total)
    measured = recall(key, say)
    seconds_ratio, bytes_ratio = calibration(key, say)
    host = max(0, free_bytes(HOST) - HOST_SPARE)
    return Machine(
        name=name,
        is_cpu=is_cpu,
        device=host if is_cpu else _free(device, total),
        device_total=total,
        context=0 if is_cpu else CONTEXT,
        host=host,
        disk=shutil.disk_usage(existing(directory)).free,
        rates=measured or (card.rates if card else quick(device)),
        watts=card.watts if card else None,
        measured=measured is not None,
        seconds_ratio=seconds_ratio,
        bytes_ratio=bytes_ratio,
    )


def _free(device: torch.device, total: int) -> int:
    """Bytes of an accelerator that a run may take, with what this process took of it already, and with its context."""
    free = free_bytes(device) + torch.accelerator.memory_reserved(device) + CONTEXT_AT_ONCE
    if device.type != "cuda":
        return free
    cap = int(torch.cuda.get_per_process_memory_fraction(device) * total)  # of torch's allocator, the context beside it
    return min(free, cap + CONTEXT, total)
