"""A plan, and the screen that a person reads it on."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.text import Text

from qlora.config import Config, MemoryConfig
from qlora.machine import GIB
from qlora.plan.bars import (
    ASCII,
    LABEL,
    UNICODE,
    Segment,
    apportion,
    as_recipe,
    count,
    duration,
    figures,
    filled,
    flow,
    gib,
    hundredths,
    labelled,
    one_line,
    plain,
    segmented,
    signed_gib,
)
from qlora.plan.types import Machine, Option, Time, Usage

CATEGORIES = (  # of Usage.device, in the order in which a bar shows them
    "base",
    "dense buffers",
    "embeddings, head, norms",
    "adapters",
    "gradients",
    "optimizer state",
    "boundary activations",
    "layer working set",
    "head and loss",
)
LEAST, MOST = 60, 100  # columns of a screen
_PRICES, _RUNNERS_UP = 5, 3  # as many as a screen has room for
_LIMITS = {
    "compute": "computation",
    "memory": "the speed of memory",
    "bus": "the bus between host and device",
    "disk": "the disk",
    "host": "the host",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will take on a machine, and how it is set up for it. `print(plan)` is the screen.

    config       the recipe, with the chosen `memory` section
    machine      what it is planned for
    model        for people: "meta-llama/Llama-3.1-8B, 8.03B parameters"
    parameters   of the base
    trainable    parameters that are trained
    usage        what a step takes as chosen
    time         how long it takes
    steps        optimizer steps of the run; None: the data was not read
    fixed        keys of `memory` that the recipe fixes
    reasons      chosen key of `memory` -> why, a few words
    runners_up   what would fit too and is slower, the fastest first
    prices       for each key: what the next leaner setting would save and cost, beside the choice
    would_fit    "longest sequence" -> "12,288 tokens", and the like, as text

    An Option's device_bytes are what device_bytes is here.
    """

    config: Config
    machine: Machine
    model: str
    parameters: int
    trainable: int
    usage: Usage
    time: Time
    steps: int | None
    fixed: frozenset[str]
    reasons: dict[str, str]
    runners_up: tuple[Option, ...]
    prices: tuple[Option, ...]
    would_fit: dict[str, str]

    @property
    def device_bytes(self) -> int:
        """Most bytes that the run takes of the device: allocated, the allocator's slack, and the context."""
        return device_bytes(self.usage, self.machine)

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens a second."""
        return self.usage.tokens / self.time.seconds if self.time.seconds else math.inf

    @property
    def hours(self) -> float | None:
        """Of the whole run."""
        return None if self.steps is None else self.steps * self.time.seconds / 3600

    @property
    def kwh(self) -> float | None:
        """What the card takes from the grid in the whole run, at its rated power."""
        if self.hours is None or self.machine.watts is None:
            return None
        return self.hours * self.machine.watts / 1000

    @property
    def calibrated(self) -> bool:
        """Whether earlier runs on this machine told how far predictions are off there."""
        return self.machine.seconds_ratio is not None or self.machine.bytes_ratio is not None

    def __str__(self) -> str:
        """The screen in 80 columns; in ASCII where the standard output knows no more."""
        try:
            "".join(UNICODE).encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            return self.screen(80, ascii_only=True).plain
        return self.screen(80).plain

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield self.screen(options.max_width, ascii_only=options.ascii_only)

    def screen(self, width: int = 80, *, ascii_only: bool = False) -> Text:
        """Everything, in at most `width` columns (60 to 100). The styles are for the eye, nothing hangs on them."""
        screen = _Screen(self, min(MOST, max(LEAST, width)), ascii_only)
        return Text("\n", no_wrap=True, overflow="ignore").join(screen.lines())

    def lines(self) -> list[str]:
        """Five lines for a run's beginning: what it takes of what there is, the time, the choices, what holds it up,
        and what the figures rest on."""
        usage, machine = self.usage, self.machine
        kind = "host memory" if machine.is_cpu else "VRAM"
        takes = [f"{gib(self.device_bytes)} of {gib(_budget(machine))} GiB of {kind}"]
        if usage.host_bytes and not machine.is_cpu:
            takes.append(f"{gib(usage.host_bytes)} of {gib(machine.host)} GiB of host memory")
        if usage.file_bytes:
            there = "" if machine.disk is None else f" of {gib(machine.disk, 0)}"
            takes.append(f"{gib(usage.file_bytes)}{there} GiB of disk")
        usual = MemoryConfig()
        memory = self.config.memory
        chosen = [
            f"{key}: {as_recipe(value)}" for key, value in memory.model_dump().items() if value != getattr(usual, key)
        ]
        limit = self.time.limited_by
        elsewhere = {phase: f" ({other})" for phase, other in self.time.limit.items() if other != limit}
        held_up = [f"{phase} {duration(s)}{elsewhere.get(phase, '')}" for phase, s in _weighty(self.time)]
        if usage.moment:
            held_up[-1] += f"; most memory in the {usage.moment}"
        return [
            ", ".join(takes),
            ", ".join([*_pace(self), *_whole_run(self)]),
            ", ".join(chosen) or "the defaults",
            f"limited by {_LIMITS[limit]}: {', '.join(held_up)}",
            "; ".join(_basis(self)),
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs: bytes, seconds and counts as they are; null where a number is not known or not
        finite.

            model, method        text; r  of the adapter
            parameters, trainable
            tokens               of a step; steps  of the run or null
            device_bytes         with slack and context; budget_bytes  free for it; fits  on device, host and disk
            host_bytes, file_bytes
            seconds              of a step; tokens_per_second; hours, kwh  of the run or null; limited_by
            calibrated
            machine              all of Machine; rates  all of Rates
            memory               the chosen section of the recipe; fixed  its keys that the recipe fixes; reasons
            usage                device, host, file: {category: bytes}; moment, slack, tokens, layers, order;
                                 flops; moved: {way: bytes}
            time                 by_phase: {phase: seconds}, limit: {phase: what}
            runners_up, prices   [{changes: {key: value}, device_bytes, host_bytes, file_bytes, seconds}]
            would_fit            {what: text}
        """
        usage = self.usage
        everything = {
            "model": self.model,
            "method": self.config.method,
            "r": self.config.lora.r,
            "parameters": self.parameters,
            "trainable": self.trainable,
            "tokens": usage.tokens,
            "steps": self.steps,
            "device_bytes": self.device_bytes,
            "budget_bytes": _budget(self.machine),
            "fits": not _shortages(usage, self.machine),
            "host_bytes": usage.host_bytes,
            "file_bytes": usage.file_bytes,
            "seconds": self.time.seconds,
            "tokens_per_second": self.tokens_per_second,
            "hours": self.hours,
            "kwh": self.kwh,
            "limited_by": self.time.limited_by,
            "calibrated": self.calibrated,
            "machine": asdict(self.machine),
            "memory": self.config.memory.model_dump(mode="json"),
            "fixed": sorted(self.fixed),
            "reasons": self.reasons,
            "usage": {
                "device": usage.device,
                "host": usage.host,
                "file": usage.file,
                "moment": usage.moment,
                "slack": usage.slack,
                "tokens": usage.tokens,
                "layers": usage.layers,
                "order": usage.order,
                "flops": usage.flops,
                "moved": usage.moved,
            },
            "time": asdict(self.time),
            "runners_up": [asdict(option) for option in self.runners_up],
            "prices": [asdict(option) for option in self.prices],
            "would_fit": self.would_fit,
        }
        return _finite(everything)


def device_bytes(usage: Usage, machine: Machine) -> int:
    """Most bytes that a run takes of the device: allocated, the allocator's slack, and the context."""
    return sum(_held(usage, machine).values())


def does_not_fit(usage: Usage, machine: Machine, suggestions: Sequence[tuple[str, float]] = ()) -> str:
    """What is short, for a usage that the machine has not room for: all of it at once, and what would fit.

    suggestions  a change as one would write it in the recipe, and the GiB that are needed with it

        needs 13.4 GiB; RTX 3060 has 11.2 of 12.0 GiB free
          boundary activations 6.8 | base 4.9 | head and loss 1.3 | adapters 0.4
          either fits:  training.per_device_train_batch_size: 2 (9.7)   memory.activations: host (8.1)
    """
    lines = _shortages(usage, machine)
    if suggestions:
        lead = f"  {('this', 'either', 'any of these')[min(len(suggestions), 3) - 1]} fits:  "
        shown = flow([f"{change} ({needed:.1f})" for change, needed in suggestions], MOST - len(lead), "   ")
        lines += [f"{lead if i == 0 else '':<{len(lead)}}{line.plain}".rstrip() for i, line in enumerate(shown)]
    return "\n".join(lines)


def _shortages(usage: Usage, machine: Machine) -> list[str]:
    """Of device, host memory and disk those that are too small: what is needed, what is there, and for what."""
    has = f"{machine.name} has {{}} of {gib(_total(machine), 1)} GiB free"
    tiers: list[tuple[Mapping[str, int], int | None, str, str]] = [
        (_held(usage, machine), _budget(machine), "", has),
        ({} if machine.is_cpu else usage.host, machine.host, " of host memory", "{} GiB can be had"),
        (usage.file, machine.disk, " of disk", "{} GiB are free"),
    ]
    lines = []
    for held, there, of, has in tiers:
        if there is not None and (needed := sum(held.values())) > there:
            need, have = _apart(needed, there)
            lines += [f"needs {need} GiB{of}; {has.format(have)}", f"  {_breakdown(held)}"]
    return lines


def _apart(needed: int, there: int) -> tuple[str, str]:
    """Both in GiB, to as many decimals as tell them apart."""
    pairs = ((gib(needed, decimals), gib(there, decimals)) for decimals in range(1, 11))
    return next(pair for pair in pairs if pair[0] != pair[1])


def _breakdown(held: Mapping[str, int]) -> str:
    """The largest, and the rest of them together, in tenths that add up."""
    largest = sorted((name for name in held if held[name]), key=lambda name: -held[name])
    kept, rest = (largest, []) if len(largest) < 7 else (largest[:5], largest[5:])
    sizes = [(name, held[name]) for name in kept] + [("the rest", sum(held[name] for name in rest))] * bool(rest)
    tenths = apportion([nbytes for _, nbytes in sizes], round(sum(held.values()) / GIB * 10))
    return " | ".join(f"{name} {n / 10:.1f}" for (name, _), n in zip(sizes, tenths, strict=True))


class _Screen:
    """The parts of a plan's screen, each some lines behind its label."""

    def __init__(self, plan: Plan, width: int, ascii_only: bool) -> None:
        self.plan, self.ascii_only = plan, ascii_only
        self.width, self.room = width, width - LABEL
        self.signs = ASCII if ascii_only else UNICODE

    def lines(self) -> list[Text]:
        groups = [
            self._head(),
            [*self._device(), *self._host(), *self._disk()],
            self._time(),
            self._choices(),
            [*self._others(), *self._would_fit()],
        ]
        out: list[Text] = []
        for group in groups:
            if group:
                out += [Text()] * bool(out) + group
        for line in out:
            line.rstrip()
        return out

    def _head(self) -> list[Text]:
        plan, machine, config = self.plan, self.plan.machine, self.plan.config
        method = config.method if config.method == "full" else f"{config.method}, r {config.lora.r}"
        free = f"{gib(_budget(machine))} of {gib(_total(machine))} GiB free"
        first = [Text(self._plain(plan.model), "bold"), f"{method}, {count(plan.trainable)} trained"]
        second = [self._plain(machine.name), free]
        return [*flow(first, self.width, "; "), *flow(second, self.width, ", "), *flow(_cut(plan), self.width, ", ")]

    def _device(self) -> list[Text]:
        plan, machine = self.plan, self.plan.machine
        held, budget, total = _held(plan.usage, machine), _budget(machine), _total(machine)
        sizes = zip(held.items(), figures(list(held.values())), strict=True)
        segments = [Segment(name, nbytes, shown) for (name, nbytes), shown in sizes]
        # Differences of what is shown, so that all of the figures add up.
        free, others = hundredths(budget) - hundredths(plan.device_bytes), hundredths(total) - hundredths(budget)
        segments.append(Segment("free", budget - plan.device_bytes, f"{free / 100:.2f}", self.signs.free))
        segments.append(Segment("not free", total - budget, f"{others / 100:.2f}", self.signs.taken))
        sums = [Text.assemble((f"{gib(plan.device_bytes)} GiB", "bold"), f" of {gib(budget)}")]
        over = plan.device_bytes - budget
        sums.append(Text(f"{gib(over)} too much", "bold red") if over > 0 else Text(f"{free / 100:.2f} to spare"))
        if plan.usage.moment:
            sums.append(Text(f"most in the {plan.usage.moment}"))
        label = "memory" if machine.is_cpu else "VRAM"
        return labelled(label, [*flow(sums, self.room, ", "), *segmented(segments, self.room, self.signs)])

    def _host(self) -> list[Text]:
        usage, machine = self.plan.usage, self.plan.machine
        return [] if machine.is_cpu else self._tier("host RAM", usage.host, machine.host)

    def _disk(self) -> list[Text]:
        return self._tier("disk", self.plan.usage.file, self.plan.machine.disk)

    def _tier(self, label: str, held: Mapping[str, int], there: int | None) -> list[Text]:
        total = sum(held.values())
        if not total:
            return labelled(label, [Text("nothing", "dim")])
        of = "" if there is None else f" of {gib(there)}"
        sums = Text.assemble((f"{gib(total)} GiB", "bold"), of)
        if there is not None and total > there:
            sums.append(f", {gib(total - there)} too much", "bold red")
        shown = zip(held.items(), figures(list(held.values())), strict=True)
        pieces = [f"{name} {figure}" for (name, nbytes), figure in shown if nbytes]
        return labelled(label, flow([sums.append(":"), *pieces], self.room, "  "))

    def _time(self) -> list[Text]:
        plan, time = self.plan, self.plan.time
        pace, *rest = [*_pace(plan), *_whole_run(plan)]
        lines = flow([Text(pace, "bold"), *rest], self.room, ", ")
        shown = dict(_weighty(time))
        most = max(shown.values(), default=0.0) or 1.0
        name_wide = max(map(len, time.by_phase), default=0)
        for phase, seconds in shown.items():
            line = Text(f"{phase:<{name_wide}} {duration(seconds):>8}  ").append(f"{time.limit[phase]:<7}  ", "dim")
            share = seconds / most if math.isfinite(seconds) else 1.0
            lines.append(line.append_text(filled(share, self.room - len(line), self.signs, "cyan")))
        if few := [f"{phase} {duration(s)}" for phase, s in time.by_phase.items() if phase not in shown and s]:
            lines += flow(few, self.room, ", ")
        return labelled("time", [*lines, *flow(_basis(plan), self.room, "; ")])

    def _choices(self) -> list[Text]:
        """The section as one would write it in the recipe, and why."""
        plan, memory = self.plan, self.plan.config.memory.model_dump()
        keys = [key for key in memory if key in plan.reasons or key in plan.fixed]
        written = [f"  {key}: {as_recipe(memory[key])}" for key in keys]
        column = min(max(map(len, written), default=0), self.width // 2) + 2
        lines = [Text("memory:", "bold")]
        for key, text in zip(keys, written, strict=True):
            why = [*["fixed by the recipe"] * (key in plan.fixed), plan.reasons.get(key, "")]
            comment = flow([self._plain("; ".join(filter(None, why)))], self.width - column - 2, "")
            line = Text(f"{self._plain(text):<{column}}")
            if len(line) > column:  # a long path: its reason stands below it
                lines.append(line)
                line = Text(" " * column)
            for i, part in enumerate(comment):
                lines.append((line if i == 0 else Text(" " * column)).append(f"# {part.plain}", "dim"))
        for key in plan.reasons:
            if key not in memory:
                lines += flow([self._plain(f"  # {key}: {plan.reasons[key]}")], self.width, "")
        return lines if len(lines) > 1 else []

    def _others(self) -> list[Text]:
        """The prices and the runners-up, each as what it takes more or less than the choice."""
        plan = self.plan
        groups = {"leaner": plan.prices[:_PRICES], "next best": plan.runners_up[:_RUNNERS_UP]}
        titles = {"memory" if plan.machine.is_cpu else "VRAM": 7, "host": 8, "disk": 8, "time": 8}
        head = "".join(f"{title:>{wide}}" for title, wide in titles.items())
        lines = labelled("", [Text(f"{head}  beside the choice, GiB", "dim")])
        for label, options in groups.items():
            rows = []
            for option in options:
                cells = zip(self._beside(option), titles.values(), strict=True)
                row = "".join(f"{cell:>{wide}}" for cell, wide in cells) + "  "
                changes = [self._plain(f"{key}: {as_recipe(value)}") for key, value in option.changes.items()]
                rows.append(Text(row + one_line(changes, self.room - len(row), self.signs)))
            lines += labelled(label, rows)
        return lines if len(lines) > 1 else []

    def _beside(self, option: Option) -> list[str]:
        """What an option takes more or less than the choice."""
        plan, now = self.plan, self.plan.time.seconds
        return [
            signed_gib(option.device_bytes - plan.device_bytes),
            signed_gib(option.host_bytes - plan.usage.host_bytes),
            signed_gib(option.file_bytes - plan.usage.file_bytes),
            f"{option.seconds / now - 1:+.1%}" if now and math.isfinite(now) else "",
        ]

    def _would_fit(self) -> list[Text]:
        pieces = [self._plain(f"{what}: {text}") for what, text in self.plan.would_fit.items()]
        return labelled("fits too", flow(pieces, self.room, ", ")) if pieces else []

    def _plain(self, text: str) -> str:
        return plain(text, self.ascii_only)


def _held(usage: Usage, machine: Machine) -> dict[str, int]:
    """Bytes of the device at the peak, by what they are for, in the order in which they are shown."""
    held = {name: usage.device[name] for name in CATEGORIES if name in usage.device}
    held |= {name: nbytes for name, nbytes in usage.device.items() if name not in held}
    return held if machine.is_cpu else held | {"allocator": usage.slack, "context": machine.context}


def _budget(machine: Machine) -> int:
    """Bytes that the run may take where it computes."""
    return (machine.device or machine.host) if machine.is_cpu else machine.device


def _total(machine: Machine) -> int:
    return max(_budget(machine), machine.device_total)


def _cut(plan: Plan) -> list[str]:
    """The step's tokens, and how they come: as `batch.regroup` cuts full rows."""
    training, data, most = plan.config.training, plan.config.data, plan.config.memory.micro_batch_tokens
    k, b, length = training.gradient_accumulation_steps, training.per_device_train_batch_size, data.max_seq_length
    text = f"{plan.usage.tokens:,} tokens a step"
    if k * b * length != plan.usage.tokens:
        return [text]
    # Neighbours are joined if they are packed, each one row by itself; padded rows are split.
    rows, together, width = (k, 1, b * length) if data.packing else (b, b, length)
    at_once = min(rows, max(1, most // width)) if most else together
    pieces = -(-rows // at_once) * (1 if data.packing else k)
    cut = f"in {pieces:,} micro-batches of {at_once * width:,}" if pieces > 1 else "in one micro-batch"
    return [f"{text}: {k * b:,} x {length:,}, {cut}"]


def _pace(plan: Plan) -> list[str]:
    return [f"{duration(plan.time.seconds)} a step", f"{plan.tokens_per_second:,.0f} tokens/s"]


def _whole_run(plan: Plan) -> list[str]:
    if plan.hours is None or plan.steps is None:
        return []
    text = f"{plan.steps:,} steps in {duration(plan.hours * 3600)}"
    return (
        [text] if plan.kwh is None else [text, f"{plan.kwh:,.{2 if plan.kwh < 1 else 1 if plan.kwh < 10 else 0}f} kWh"]
    )


def _weighty(time: Time) -> list[tuple[str, float]]:
    """The phases that are worth a line."""
    return [(phase, seconds) for phase, seconds in time.by_phase.items() if seconds >= 0.02 * time.seconds]


def _basis(plan: Plan) -> list[str]:
    machine = plan.machine
    ratios = [("time", machine.seconds_ratio), ("memory", machine.bytes_ratio)]
    known = ", ".join(f"{what} x {ratio:.2f}" for what, ratio in ratios if ratio is not None)
    return [
        "measured rates"
        if machine.measured
        else "rates tried out in a moment, not measured"
        if machine.is_cpu
        else "rates of the data sheet, not measured",
        f"calibrated by earlier runs: {known}" if known else "not calibrated by a run",
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
