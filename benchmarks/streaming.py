"""What it costs when the frozen layers do not live on the device: tokens a second by tier and by tokens per step.

    python benchmarks/streaming.py                                                  on the CPU: 302M parameters
    python benchmarks/streaming.py --device cuda --shape llama3.1-8b --cap-gib 24 --memory activations=host
    python benchmarks/streaming.py --device cuda --shape llama3.1-8b --cap-gib 24 --tiers resident \\
        --memory activations=host,layer_tile_tokens=4096 --longest 8192-1048576

The base is random (random_base.py), so that no checkpoint is needed; the step is the trainer's own, as in step.py.

    resident  all layers on the device      host  all in host memory      file  all in the NF4 cache on disk

A step fetches each layer twice, however many micro-batches it has: the more tokens a step, the less a tier costs. Files
are read past the page cache where the system can (`direct_reads`).

Each (shape, tier, cap) is a process of its own. On the CPU the tiers take a step in turn, so that a machine that drifts
is slow to all; on a GPU, which they could not share, they come one after the other. A process that fails, or is not
done in time, takes nothing with it: the JSON is written after each measurement. The tiers' losses must agree, bit for
bit on the CPU (on a GPU the first: attention's backward sums in any order there), or the exit status is 1.

`stalled` is the time for which the computation stood still because a layer was not there: between the events before and
behind the wait for it. On the CPU a layer on the host is copied by the thread that computes, which stalls nothing and
takes its time; look at the speed for that.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    ALPHA,
    LEARNING_RATE,
    RANK,
    RESULTS,
    ROOT,
    SEED,
    forget_peak,
    host_peak_gib,
    peak_gib,
    random_batches,
    spread,
    surroundings,
    synchronize,
    works_of,
)
from rich.console import Console
from rich.table import Table

from qlora.machine import GIB, device_name, memory_gib, peak_memory_gib

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qlora.model.residency import Residency

TIERS: dict[str, dict[str, Any]] = {
    "resident": {},
    "host": {"layers_on_device": 0},
    "file": {"layers_on_device": 0, "layers_on_host": 0},
}
USUAL: dict[str, dict[str, Any]] = {  # by device
    "cpu": {"shape": "mid", "work": "1x64,1x256,2x256,4x256", "warm_up": 1},
    "cuda": {"shape": "llama3.1-8b", "work": "1x4096,4x4096,16x4096", "warm_up": 2},
}
MOST_PROBED = 4 * GIB  # bytes that are fetched to see what a tier gives by itself

Case = dict[str, Any]  # shape, tier, cap_gib, memory, device, directory


# --- one case's process -----------------------------------------------------------------------------------------------


def case_process(pipe: Connection, case: Case) -> None:
    """Load, report, then a step for each (k, tokens) that comes through the pipe, until None does."""
    warnings.filterwarnings("ignore")
    try:
        serve(pipe, case)
    except Exception as error:
        import torch

        from qlora.errors import HostMemoryError

        pipe.send(
            {
                "error": f"{type(error).__name__}: {error}".partition("\n")[0],
                "out_of_memory": any(isinstance(e, torch.OutOfMemoryError | HostMemoryError) for e in causes(error)),
                "traceback": traceback.format_exc(),
            }
        )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def serve(pipe: Connection, case: Case) -> None:
    """As `case_process`; errors come out."""
    import torch
    from random_base import random_source
    from transformers.utils.logging import disable_progress_bar

    from qlora.config import Config
    from qlora.model.adapters import attach, trainable
    from qlora.model.load import load_base
    from qlora.model.nf4 import four_bit_weights
    from qlora.train.step import LayerMajor, choose

    disable_progress_bar()
    device = torch.device("cpu") if case["device"] == "cpu" else torch.device(case["device"], 0)
    if case["cap_gib"] is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(case["cap_gib"] * GIB / total, device)
    directory = Path(case["directory"])
    config = Config.model_validate(
        {
            "model": {"model_name_or_path": case["shape"]},
            "lora": {"r": RANK, "lora_alpha": ALPHA},
            "data": {"datasets": [{"path": "unused.jsonl"}]},
            # The other tiers need no cache: drawing the weights again is faster than writing them.
            "memory": {"order": "layer-major", "nf4_cache_dir": str(directory) if case["tier"] == "file" else None}
            | TIERS[case["tier"]]
            | case["memory"],
        }
    )
    source = random_source(case["shape"], directory, device, SEED)
    base = load_base(config, source, device, print)
    adapted = attach(base.model, config.lora, SEED).train()
    step = choose(base.model, device, config.memory, SEED, directory, print)
    assert isinstance(step, LayerMajor)
    parameters = list(trainable(adapted).values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    stalls = Stalls(step.residency)
    layer_nbytes = sum(weight.nbytes for weight in four_bit_weights(step.blocks.layers[0]))
    pipe.send(
        {
            "device_name": device_name(device),
            "device_gib": torch.cuda.get_device_properties(device).total_memory / GIB
            if device.type == "cuda"
            else None,
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
            "parameters": base.parameters,
            "layers": len(step.blocks),
            "layer_mib": layer_nbytes / 2**20,
            "tiers": step.residency.tiers,
            "trained": sum(p.numel() for p in parameters),
            "load_seconds": base.seconds,
            "from_cache": base.cached,
            "loaded_gib": memory_gib(device),
            "load_peak_gib": peak_gib(device),
            **alone(step.blocks.layers, device),
        }
    )
    now, batches, told_apart = None, [], True
    while work := pipe.recv():
        if work != now:
            now, batches = work, []  # dropped before there are others
            batches = random_batches(base.model.config.vocab_size, work[0], work[1], device)
            if device.type != "cpu":
                torch.accelerator.empty_cache()
            told_apart = forget_peak(device)
        fetches, waited = step.residency.fetches, step.residency.waited
        synchronize(device)
        started = time.perf_counter()
        loss = step(batches).loss
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds = time.perf_counter() - started
        peaks = {"peak_gib": peak_gib(device), "host_peak_gib": host_peak_gib(), "peaks_told_apart": told_apart}
        if device.type != "cpu":
            peaks["reserved_peak_gib"] = peak_memory_gib(device)
        fetches = step.residency.fetches - fetches
        pipe.send(
            {
                "seconds": seconds,
                "loss": loss,
                "fetches": fetches,
                "fetched_gib": fetches * layer_nbytes / GIB,
                "waited_seconds": step.residency.waited - waited,
                "stalled_seconds": stalls.seconds(),
                **peaks,
            }
        )


class Stalls:
    """For how long the computation stood still for want of a layer.

    The residency's own `waited` is what the host waited, which on a GPU runs ahead: so here it is events of the
    device's stream, one before and one behind the wait for a layer's bytes, between which nothing is computed.
    """

    def __init__(self, residency: Residency) -> None:
        self._device = residency.device
        self._pairs: list[tuple[Any, Any]] = []
        parts_held = residency._parts_held

        @contextmanager
        def watched(i: int) -> Iterator[None]:
            before = self._mark()
            with parts_held(i):
                self._pairs.append((before, self._mark()))
                yield

        residency._parts_held = watched

    def _mark(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        import torch

        event = torch.Event(self._device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device))
        return event

    def seconds(self) -> float:
        """Since it was asked last; the device must have come to its end."""
        pairs, self._pairs = self._pairs, []
        if self._device.type == "cpu":
            return sum(behind - before for before, behind in pairs)
        return sum(before.elapsed_time(behind) for before, behind in pairs) / 1000


def alone(layers: nn.ModuleList, device: torch.device) -> dict[str, Any]:
    """What a tier gives with nothing beside it: layers fetched one by one, as a step does, in GiB/s."""
    import torch

    from qlora.model.homes import OnFile, padded
    from qlora.model.nf4 import four_bit_weights
    from qlora.model.transfer import Lane, host_buffer

    homes: list[Any] = [four_bit_weights(layer)[0].home for layer in layers]
    if homes[0] is None:
        return {"alone_gib_per_second": None, "direct_reads": None}
    largest = max(padded(home.layout.nbytes) for home in homes)
    slot = (
        host_buffer(largest, device) if device.type == "cpu" else torch.empty(largest, dtype=torch.uint8, device=device)
    )
    lane, rates, fetched = Lane(device), [], 0
    for home in homes:
        started = time.perf_counter()
        lane.follow(home.fetch(slot, lane, lane.now())())
        synchronize(device)
        rates.append(home.layout.nbytes / GIB / (time.perf_counter() - started))
        fetched += home.layout.nbytes
        if fetched > MOST_PROBED:
            break
    reader = homes[0].reader if isinstance(homes[0], OnFile) else None
    return {"alone_gib_per_second": spread(rates), "direct_reads": reader.direct if reader else None}


# --- the parent -------------------------------------------------------------------------------------------------------


class Side:
    """A case in its process, which has `limit_s` seconds for everything."""

    def __init__(self, case: Case, limit_s: float) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would count this process's memory
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=case_process, args=(there, case))
        self._process.start()
        there.close()
        self._limit_s, self._deadline = limit_s, time.monotonic() + limit_s
        self.failure: dict[str, Any] | None = None

    def report(self, work: tuple[int, int] | None = None) -> dict[str, Any] | None:
        """The load's report, or that of a step of k x tokens; None where it failed, now or before."""
        if self.failure is not None:
            return None
        try:
            if work is not None:
                self._pipe.send(work)
            if self._pipe.poll(max(0.0, self._deadline - time.monotonic())):
                said = self._pipe.recv()
            else:
                said = {"error": f"was not done within {self._limit_s:g} s", "late": True}
        except (EOFError, OSError):
            self._process.join(10)
            said = {"error": f"its process ended with status {self._process.exitcode}"}
        if "error" not in said:
            return said
        self.failure = said
        self.close()
        return None

    def close(self) -> None:
        if self.failure is None:
            try:
                self._pipe.send(None)
                self._process.join(60)
            except OSError:
                pass
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def measure(
    cases: list[Case],
    works: list[tuple[int, int]],
    warm_up: int,
    steps: int,
    limit_s: float,
    note: Callable[[Case], None],
    say: Callable[[str], None],
) -> None:
    """Let cases take steps in turn, and note each one's figures when there are more."""
    with ExitStack() as stack:
        sides: list[tuple[Case, Side]] = []
        for case in cases:
            side = Side(case, limit_s)
            stack.callback(side.close)
            case["loaded"], case["works"] = side.report(), []
            say(f"{_title(case)}  {'failed' if side.failure else 'loaded'}")
            sides.append((case, side))
        for k, tokens in works:
            reports: dict[int, list[dict[str, Any]]] = defaultdict(list)
            for n in range(warm_up + steps):
                for at, (case, side) in enumerate(sides):
                    if said := side.report((k, tokens)):
                        reports[at].append(said)
                        turn = "warm-up" if n < warm_up else f"step {n - warm_up + 1}/{steps}"
                        say(f"{_title(case)}  {k} x {tokens}  {turn}  {said['seconds']:.3f} s")
            for at, (case, side) in enumerate(sides):
                if len(reports[at]) == warm_up + steps:
                    case["works"].append(figures(k, tokens, reports[at], warm_up))
                elif side.failure is not None and "failure" not in case:
                    case["failure"] = side.failure | {"k": k, "tokens": tokens}
                    say(f"{_title(case)}  {k} x {tokens}  {side.failure['error']}")
                note(case)


def figures(k: int, tokens: int, reports: list[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    """Every figure of a case's steps as it came, and what follows from the timed ones."""
    timed = reports[warm_up:]
    peaks = [key for key in ("peak_gib", "reserved_peak_gib", "host_peak_gib") if key in reports[0]]
    return {
        "k": k,
        "tokens": tokens,
        "tokens_per_step": k * tokens,
        "tokens_per_second": spread([k * tokens / said["seconds"] for said in timed]),
        "stalled_share": spread([said["stalled_seconds"] / said["seconds"] for said in timed]),
        "waited_share": spread([said["waited_seconds"] / said["seconds"] for said in timed]),
        "fetches_per_step": timed[-1]["fetches"],
        "fetched_gib_per_step": timed[-1]["fetched_gib"],
        "peaks_told_apart": reports[-1]["peaks_told_apart"],
        **{key: max(said[key] for said in reports) for key in peaks},
        "losses": [said["loss"] for said in reports],
        "warm_up_seconds": [said["seconds"] for said in reports[:warm_up]],
        "seconds": [said["seconds"] for said in timed],
    }


def against_resident(cases: list[Case]) -> None:
    """Give each work of each case its speed as a share of the resident tier's, step by step, where that ran."""
    for case in cases:
        base = next((other for other in cases if other["tier"] == "resident" and _kin(other) == _kin(case)), None)
        for work in case["works"]:
            same = [w for w in base["works"] if (w["k"], w["tokens"]) == (work["k"], work["tokens"])] if base else []
            pairs = zip(same[0]["seconds"], work["seconds"], strict=True) if same else []
            ratios = [there / here for there, here in pairs]
            work["of_resident"] = spread(ratios) if ratios else None


def compare_losses(cases: list[Case]) -> list[dict[str, Any]]:
    """Whether the tiers of one shape computed the same."""
    groups = defaultdict(list)
    for case in cases:
        losses = [loss for work in case["works"] for loss in work["losses"]]
        if losses:
            groups[case["shape"], json.dumps(case["memory"])].append((case, losses))
    checks = []
    for (shape, _), members in groups.items():
        n = 1 if members[0][0]["device"] != "cpu" else min(len(losses) for _, losses in members)
        checks.append(
            {
                "shape": shape,
                "cases": [_title(case) for case, _ in members],
                "compared": n,
                "equal": all(losses[:n] == members[0][1][:n] for _, losses in members),
            }
        )
    return checks


def longest(
    case: Case, least: int, most: int, limit_s: float, note: Callable[[Case], None], say: Callable[[str], None]
) -> None:
    """The longest single sequence of which a step fits: doubled until one does not, then halved in between.

    A process that ran out of memory is not asked again, so each failure is followed by a new one.

    limit_s  for a process; after twice that no other trial begins
    """
    begun, side = time.monotonic(), None
    good, bad, tokens = 0, most + 1, least
    case["works"], case["trials"] = [], []
    try:
        while True:
            if side is None:
                side = Side(case, limit_s)
                case["loaded"] = side.report()
                side.report((1, min(least, 1024)))  # what a step leaves behind (the optimizer's state) is there then
            said = side.report((1, tokens))
            trial = {"tokens": tokens, **(said or side.failure or {})}
            case["trials"].append(trial)
            say(f"{_title(case)}  1 x {tokens}  {format(said['seconds'], '.1f') + ' s' if said else trial['error']}")
            if said:
                good = tokens
                case["longest"] = {"tokens": tokens, "tokens_per_second": tokens / said["seconds"], **said}
            else:
                bad = tokens
                if not trial.get("out_of_memory") or case["loaded"] is None:
                    case["failure"] = side.failure
            note(case)
            if not said:
                side = None
            # An eighth is near enough. 1024: what sequence lengths are multiples of, at these lengths.
            unit = 1024 if least >= 1024 else 1
            tokens = min(good * 2, most) if bad > most else (good + bad) // 2 // unit * unit
            done = tokens <= good or (bad <= most and bad - good <= good // 8) or "failure" in case
            if done or time.monotonic() - begun > 2 * limit_s:
                case["ended_early"] = not done
                break
    finally:
        if side is not None:
            side.close()
    note(case)


def _kin(case: Case) -> tuple[Any, ...]:
    """What two cases share that differ in nothing but the tier."""
    return case["shape"], case["cap_gib"], json.dumps(case["memory"])


def _title(case: Case, tier: bool = True) -> str:
    cap = f"  {case['cap_gib']:g} GiB" if case["cap_gib"] is not None else ""
    return f"{Path(case['shape']).name.removesuffix('.json')}{cap}{'  ' + case['tier'] if tier else ''}"


def table(cases: list[Case]) -> Table:
    """What people want to know first, of cases that differ in the tier."""
    keys = {"peak_gib": "VRAM\npeak", "reserved_peak_gib": "\nreserved", "host_peak_gib": "RSS\npeak"}
    if cases[0]["device"] == "cpu":
        keys = {"peak_gib": "RSS\npeak"}
    shown = Table(title=f"{_title(cases[0], tier=False)}: median, p20-p80; GiB")
    for column in ["tier", "k x T", "tokens/s", "of\nresident", "\nstalled", "fetches\na step", *keys.values()]:
        shown.add_column(column, no_wrap=True)
    for case in cases:
        rows: list[tuple[str, ...]] = [
            (
                f"{work['k']} x {work['tokens']}",
                "{median:.0f} {p20:.0f}-{p80:.0f}".format(**work["tokens_per_second"]),
                "{median:.2f}".format(**work["of_resident"]) if work["of_resident"] else "",
                f"{100 * work['stalled_share']['median']:.1f}%",
                f"{work['fetches_per_step']}",
                *(f"{work[key]:.2f}" for key in keys),
            )
            for work in case["works"]
        ]
        if best := case.get("longest"):
            share = f"{100 * best['stalled_seconds'] / best['seconds']:.1f}%"
            speed = f"{best['tokens_per_second']:.0f}"
            rows.append(
                (f"1 x {best['tokens']}", speed, "", share, *(f"{best[key]:.2f}" for key in ["fetches", *keys]))
            )
        if "failure" in case:
            rows.append(("", case["failure"]["error"][:24]))
        for n, row in enumerate(rows):
            shown.add_row("" if n else case["tier"], *row, end_section=n == len(rows) - 1)
    return shown


def _caps(text: str) -> list[float | None]:
    """`24,8,none` -> [24.0, 8.0, None]"""
    return [None if cap == "none" else float(cap) for cap in text.split(",")]


def _memory(text: str) -> dict[str, Any]:
    """`activations=host,layer_tile_tokens=4096` -> keys of the recipe's `memory` section."""
    pairs = (pair.partition("=")[::2] for pair in text.split(",") if pair)
    return {key: int(value) if value.isdigit() else value for key, value in pairs}


def _tiers(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(TIERS):
        raise argparse.ArgumentTypeError(f"no such tier: {', '.join(sorted(unknown))}; there are {', '.join(TIERS)}")
    return text.split(",")


def _bounds(text: str) -> tuple[int, int]:
    """`8192-1048576` -> (8192, 1048576)"""
    least, most = (int(part) for part in text.split("-"))
    if not 2 <= least <= most:
        raise argparse.ArgumentTypeError(f"`{text}` is not LEAST-MOST")
    return least, most


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", choices=tuple(USUAL), default="cpu", help="(default: cpu)")
    parser.add_argument("--shape", help="`mid`, names in shapes/, or paths of a config.json; with commas")
    parser.add_argument("--tiers", type=_tiers, default=list(TIERS), help="of resident,host,file (default: all)")
    parser.add_argument("--cap-gib", type=_caps, default=[None], help="most GiB of the device, any number of them")
    parser.add_argument("--work", type=works_of, help="micro-batches x tokens, any number, the smallest first")
    parser.add_argument("--memory", type=_memory, default={}, help="keys of the recipe's memory section: k=v,k=v")
    parser.add_argument("--steps", type=int, default=3, help="to time, of each work (default: 3)")
    parser.add_argument("--warm-up", type=int, help="steps before them (default: 1 on the CPU, 2 on a GPU)")
    parser.add_argument("--longest", type=_bounds, metavar="LEAST-MOST", help="look for the longest context instead")
    parser.add_argument("--limit-s", type=float, default=900, help="seconds for each process (default: 900)")
    parser.add_argument("--cache-dir", type=Path, default=ROOT / ".cache" / "streaming", help="of the file tier")
    parser.add_argument("--out", type=Path, help="JSON (default: benchmarks/results/streaming_<device>_<date>.json)")
    asked = parser.parse_args()
    usual = USUAL[asked.device]
    asked.shape = (asked.shape or usual["shape"]).split(",")
    asked.work = asked.work or works_of(usual["work"])
    asked.warm_up = usual["warm_up"] if asked.warm_up is None else asked.warm_up
    if asked.steps < 1:
        parser.error("--steps: at least one")
    if asked.device == "cpu" and asked.cap_gib != [None]:
        parser.error("--cap-gib: the CPU's allocator takes no cap")
    return asked


def main() -> int:
    asked, console = arguments(), Console(highlight=False)
    about = surroundings(asked.warm_up) | {"device": asked.device}
    out = asked.out or RESULTS / f"streaming_{asked.device}_{about['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    common = {"memory": asked.memory, "device": asked.device, "directory": str(asked.cache_dir)}
    groups = [
        [{"shape": shape, "cap_gib": cap, "tier": tier, **common} for tier in asked.tiers]
        for shape in asked.shape
        for cap in asked.cap_gib
    ]
    cases: list[Case] = []

    def note(case: Case) -> None:
        if not any(case is known for known in cases):
            cases.append(case)
        against_resident(cases)
        shown = [{k: v for k, v in known.items() if k not in ("directory", "device")} for known in cases]
        out.write_text(json.dumps(about | {"losses": compare_losses(cases), "cases": shown}, indent=1) + "\n")

    for group in groups:
        if asked.longest:
            least, most = asked.longest
            for case in group:
                longest(case, least, most, asked.limit_s, note, console.print)
            continue
        # On a GPU one at a time: two processes would share its memory and its clock.
        for together in [group] if asked.device == "cpu" else [[case] for case in group]:
            measure(together, asked.work, asked.warm_up, asked.steps, asked.limit_s, note, console.print)

    loaded = next((case["loaded"] for case in cases if case["loaded"]), None)
    for kin in dict.fromkeys(_kin(case) for case in cases):
        console.print(table([case for case in cases if _kin(case) == kin]))
    for case in cases:
        if rate := (case["loaded"] or {}).get("alone_gib_per_second"):
            past = {True: ", past the page cache", False: ", THROUGH the page cache"}.get(
                case["loaded"]["direct_reads"], ""
            )
            console.print(f"{_title(case)}: {rate['median']:.2f} GiB/s by itself{past}")
    console.print(f"{loaded['device_name'] if loaded else 'nothing loaded'}; every figure is in {out}")
    broken = [case for case in cases if not _expected(case.get("failure"))]
    for case in broken:
        console.print(f"[bold red]{_title(case)}[/]", case["failure"].get("traceback") or case["failure"]["error"])
    apart = [check["shape"] for check in compare_losses(cases) if not check["equal"]]
    if apart:
        console.print(f"[bold red]THE LOSSES OF THE TIERS DIFFER: {', '.join(apart)}[/]")
    return 1 if apart or broken or not loaded else 0


def _expected(failure: dict[str, Any] | None) -> bool:
    """Running out of memory or of time is a result here."""
    return failure is None or bool(failure.get("out_of_memory") or failure.get("late"))


if __name__ == "__main__":
    sys.exit(main())
