"""Predicted against measured: what `qlora plan` says of a step, beside what the step takes.

    python benchmarks/predicted.py                                        on the CPU: 23M parameters, a minute or two
    python benchmarks/predicted.py --quick                                two cases of it
    python benchmarks/predicted.py --device cuda --cap-gib 24 --minutes 9

The base is random (random_base.py), so that no checkpoint is needed; the step is the trainer's own, optimizer included.

    allocated  predicted: the simulation's peak             measured: torch.cuda.max_memory_allocated
    reserved   predicted: that and the allocator's slack    measured: torch.cuda.max_memory_reserved
    tokens/s   predicted: the time model, with the rates    measured: median step
               that this machine was found to have; beside
               it, with those of the card's data sheet

The predictions are made first, with nothing known of the runs. Each case runs in a process of its own, so that the
allocator starts fresh, and one after the other. A case that fails or is late takes nothing with it: the JSON is written
after each. Errors are predicted / measured - 1. The exit status is 1 where a case failed or a limit was missed.

On the CPU what is counted is storages, of real tensors, by the same ledger that counts the fake ones; nothing is
reserved there, and the time is shown but not judged.

The optimizer is `adamw_8bit`: torch's figures have not got the state of the paged one.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ALPHA, RANK, RESULTS, ROOT, SEED, forget_peak, host_peak_gib, surroundings, synchronize
from rich.console import Console
from rich.table import Table

from qlora.machine import GIB, device_name
from qlora.plan.seconds import time_of
from qlora.plan.types import Rates, Usage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qlora.config import Config
    from qlora.model.batch import Batch

SMALL: dict[str, Any] = {  # for two CPU cores
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A step that is predicted and measured: k micro-batches of [rows, tokens].

    packing  a micro-batch is one row in which `rows` documents stand one after the other
    memory   keys of the recipe's section
    """

    shape: str
    rows: int
    tokens: int
    k: int
    memory: dict[str, Any] = field(default_factory=dict)
    packing: bool = False

    @property
    def tokens_per_step(self) -> int:
        """Of all micro-batches."""
        return self.k * self.rows * self.tokens

    @property
    def title(self) -> str:
        """For people."""
        name = Path(self.shape).name.removesuffix(".json")
        return f"{name} {self.k} x {self.rows} x {self.tokens}{' packed' if self.packing else ''}"

    @property
    def knobs(self) -> str:
        """What differs from the usual, for people."""
        return ", ".join(f"{key}={value}" for key, value in self.memory.items())


_8B, _3B, _1B = "llama3.1-8b", "llama3.2-3b", "llama3.2-1b"
_ELSEWHERE = {"layers_on_device": 0, "activations": "host", "embeddings": "host", "adapters": "host"}
CASES: dict[str, tuple[Case, ...]] = {  # by device; the most telling come first. All fit into 24 GiB
    "cuda": (
        Case(_8B, 1, 4096, 4),
        Case(_8B, 1, 4096, 4, _ELSEWHERE),
        Case(_1B, 4, 2048, 2, {"micro_batch_tokens": 0, "layers_kept": 6}),
        Case(_3B, 1, 8192, 1, {"layer_tile_tokens": 2048, "activations": "host"}),
        Case(_8B, 2, 2048, 4, {"layers_on_device": 16}),
        Case(_1B, 1, 4096, 4, {"loss_chunk_tokens": 1024}),
        Case(_8B, 4, 1024, 2, {"micro_batch_tokens": 4096, "layers_kept": 4}),
        Case(_3B, 8, 512, 2, {"micro_batch_tokens": 2048, "loss_chunk_tokens": 64}),
        Case(_8B, 1, 16384, 1, {"activations": "host", "embeddings": "host", "layer_tile_tokens": 2048}),
        Case(_3B, 1, 4096, 4, {"layers_on_device": 0, "adapters": "host"}),
        Case(_1B, 16, 512, 2),
        Case(_3B, 4, 2048, 1, {"embeddings": "host"}, packing=True),
        Case(_8B, 1, 4096, 2, {"layers_on_device": 0, "activations": "host", "layers_kept": 2}),
        Case(_1B, 1, 32768, 1, {"layer_tile_tokens": 2048, "activations": "host", "adapters": "host"}),
        Case(_3B, 2, 4096, 2, {"layers_on_device": 12, "loss_chunk_tokens": 1024}),
        Case(_1B, 2, 4096, 2, {"layers_on_device": 0, "layers_on_host": 0}),
    ),
    "cpu": (
        Case("small", 2, 256, 2),
        Case("small", 1, 512, 2, _ELSEWHERE),
        Case("small", 2, 256, 2, {"layers_kept": 3, "loss_chunk_tokens": 64}),
        Case("small", 1, 512, 1, {"layer_tile_tokens": 128}),
        Case("small", 4, 128, 2, {"micro_batch_tokens": 256, "layers_on_device": 4}),
        Case("small", 4, 128, 2, {"micro_batch_tokens": 0}, packing=True),
    ),
}
QUICK = {"cuda": 4, "cpu": 2}  # cases, by device
# Relative errors that are still right. The seconds of a CPU that does other things as well are not judged.
LIMITS = {"cuda": {"allocated": 0.03, "reserved": 0.03, "tokens_per_second": 0.15}, "cpu": {"allocated": 0.01}}
LEAST = {"cuda": 12, "cpu": 1}  # cases without which nothing is shown
FIGURES = ("allocated", "reserved", "tokens_per_second", "tokens_per_second_data_sheet")


def config_of(case: Case, directory: Path, steps: int = 1) -> Config:
    """The recipe of a case. directory: for the files of layers on disk."""
    from qlora.config import Config

    on_file = "layers_on_host" in case.memory  # without, drawing the weights again is faster than writing them
    return Config.model_validate(
        {
            "model": {"model_name_or_path": case.shape},
            "lora": {"r": RANK, "lora_alpha": ALPHA},
            "data": {"datasets": [{"path": "unused.jsonl"}], "max_seq_length": case.tokens, "packing": case.packing},
            "training": {
                "per_device_train_batch_size": case.rows,
                "gradient_accumulation_steps": case.k,
                "optim": "adamw_8bit",
                "max_steps": steps,
                "output_dir": str(directory),
            },
            "memory": {"nf4_cache_dir": str(directory) if on_file else None} | case.memory,
        }
    )


# --- predicted --------------------------------------------------------------------------------------------------------


def predict(case: Case, kind: str, directory: Path) -> tuple[Usage, float]:
    """What the simulation says of a case, and the seconds that it took to say it. kind: "cuda" or "cpu"."""
    import torch
    from random_base import shape_of
    from transformers import AutoConfig

    from qlora.plan.periodic import Simulator
    from qlora.plan.simulate import ACCELERATOR, HOST

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # there is nothing to compute
    started = time.perf_counter()
    config, model_config = config_of(case, directory), AutoConfig.for_model(**shape_of(case.shape))
    simulator = Simulator(config, model_config, case.tokens, HOST if kind == "cpu" else ACCELERATOR)
    return simulator.usage(config.memory), time.perf_counter() - started


def foretold(usage: Usage, simulated_seconds: float) -> dict[str, Any]:
    """A prediction of memory as it is written down."""
    return {
        "allocated_bytes": usage.peak_bytes,
        "reserved_bytes": usage.peak_bytes + usage.slack,
        "slack_bytes": usage.slack,
        "host_bytes": usage.host_bytes,
        "device": usage.device,
        "host": usage.host,
        "file": usage.file,
        "moment": usage.moment,
        "tokens": usage.tokens,
        "order": usage.order,
        "flops": usage.flops,
        "moved": dict(usage.moved),
        "simulated_seconds": simulated_seconds,
    }


def in_time(usage: Usage, rates: Rates) -> dict[str, Any]:
    """A prediction of time, as it is written down."""
    time = time_of(usage, rates)
    return {
        "seconds": time.seconds,
        "tokens_per_second": usage.tokens / time.seconds,
        "by_phase": time.by_phase,
        "limit": time.limit,
        "limited_by": time.limited_by,
    }


# --- measured ---------------------------------------------------------------------------------------------------------


def rates_here(kind: str, directory: Path, budget: float) -> dict[str, Any]:
    """What the machine can do: as measured now, and as the card's data sheet has it."""
    import torch

    from qlora.plan.cards import identify
    from qlora.plan.measure import measure, total_bytes

    device, notes = _device(kind), []
    name, total = device_name(device), total_bytes(device)
    card = None if kind == "cpu" else identify(name, total)
    return {
        "device_name": name,
        "total_bytes": total,
        "cuda": torch.version.cuda,
        "card": card,
        "measured": measure(device, directory, notes.append, budget),
        "data_sheet": card.rates if card else None,
        "notes": notes,
    }


def take(case: Case, kind: str, cap_gib: float | None, warm_up: int, steps: int, directory: Path) -> dict[str, Any]:
    """Load a case's model and train: what its steps took. steps: timed ones."""
    import torch
    from random_base import random_source
    from transformers.utils.logging import disable_progress_bar

    from qlora.model.adapters import attach, trainable
    from qlora.model.load import load_base
    from qlora.plan.ledger import Ledger
    from qlora.train.loop import Loop
    from qlora.train.step import choose

    warnings.filterwarnings("ignore")
    disable_progress_bar()
    device, notes = _device(kind), list[str]()
    if cap_gib is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * GIB / total), device)
    config = config_of(case, directory, warm_up + 1 + steps)
    base = load_base(config, random_source(case.shape, directory, device, SEED), device, notes.append)
    adapted = attach(base.model, config.lora, SEED).train()
    ledger = Ledger() if kind == "cpu" else None
    if ledger is not None:
        count(base.model, ledger)
    losses, seconds = list[float](), list[float]()

    def emit(event: str, **said: Any) -> None:
        notes.append(str(said.get("text", event)))

    with ledger or nullcontext():
        batches = batches_of(case, base.model.config.vocab_size, device)
        step = choose(base.model, device, config.memory, SEED, directory, notes.append)
        loop = Loop(step, trainable(adapted), lambda _: batches, config.training, {}, emit)

        def train() -> None:
            synchronize(device)
            started, number = time.perf_counter(), len(losses) + 1
            result = step(batches, number)
            loop.update(result, batches, number)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
            losses.append(result.loss)

        for _ in range(warm_up):
            train()
        told_apart = forget_peak(device)
        if ledger is not None:
            ledger.start()
            train()  # counting takes time, so this step is not timed
    del seconds[warm_up:]
    for _ in range(steps):
        train()
    return {
        **(held(device) if ledger is None else counted(ledger)),
        "host_peak_gib": host_peak_gib(),
        "peaks_told_apart": told_apart,
        "seconds": seconds[warm_up:],
        "median_seconds": statistics.median(seconds[warm_up:]),
        "tokens_per_second": case.tokens_per_step / statistics.median(seconds[warm_up:]),
        "warm_up_seconds": seconds[:warm_up],
        "losses": losses,
        "parameters": base.parameters,
        "load_seconds": base.seconds,
        "notes": notes,
    }


def batches_of(case: Case, vocab: int, device: torch.device) -> list[Batch]:
    """A step's micro-batches of random tokens, each of which carries loss where it can."""
    import torch

    from qlora.model.batch import IGNORE_INDEX, Batch

    generator, batches = torch.Generator().manual_seed(SEED), list[Any]()
    for _ in range(case.k):
        ids = torch.randint(vocab, (case.rows, case.tokens), generator=generator)
        labels = ids.clone()
        labels[:, 0] = IGNORE_INDEX  # nothing comes before it that could predict it
        places = torch.arange(case.tokens).repeat(case.rows, 1)
        shape = (1, -1) if case.packing else ids.shape
        batches.append(Batch(ids.reshape(shape), places.reshape(shape), labels.reshape(shape)).to(device))
    return batches


def count(model: PreTrainedModel, ledger: Any) -> None:
    """Make a loaded model known to a ledger."""
    from qlora.model.homes import OnHost
    from qlora.model.nf4 import four_bit_weights

    for tensor in (*model.parameters(), *model.buffers()):
        ledger.name(tensor, "model")
    for weight in four_bit_weights(model):
        for part in [weight.home.buffer] if isinstance(weight.home, OnHost) else (weight.held or {}).values():
            ledger.name(part, "model")


def counted(ledger: Any) -> dict[str, Any]:
    """What a ledger saw of real tensors in host memory."""
    from qlora.plan.simulate import HOST

    return {"allocated_bytes": ledger.peak(HOST)[1].nbytes}


def held(device: torch.device) -> dict[str, Any]:
    """What torch's allocator says of the steps, and what the process has beside it."""
    import torch

    stats = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "at_rest_bytes": torch.cuda.memory_allocated(device),  # between two steps
        "requested_bytes": stats.get("requested_bytes.all.peak"),  # before they are rounded up
        "retries": stats.get("num_alloc_retries"),
        "outside_bytes": total - free - torch.cuda.memory_reserved(device),  # the context; and others' programs
    }


def _device(kind: str) -> torch.device:
    import torch

    return torch.device("cpu") if kind == "cpu" else torch.device(kind, 0)


# --- in a process of its own ------------------------------------------------------------------------------------------


def apart(limit_s: float, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function returns that runs in a process of its own; {"error": ...} where it fails or is late."""
    context = multiprocessing.get_context("spawn")  # a fork would have this process's memory, and no CUDA
    pipe, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        if not pipe.poll(max(0.0, limit_s)):
            return {"error": f"was not done within {limit_s:.0f} s", "late": True}
        answer = pipe.recv()
        process.join(10)
        return answer
    except EOFError:
        process.join(10)
        return {"error": f"its process ended with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _answer(pipe: Connection, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    try:
        answer = function(*arguments)
    except Exception as error:
        answer = {"error": _line(error), "traceback": traceback.format_exc()}
    pipe.send(answer)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


# --- the parent -------------------------------------------------------------------------------------------------------


Entry = dict[str, Any]  # case, predicted, measured, errors; failure, skipped


def predictions(cases: Sequence[Case], kind: str, directory: Path, workers: int) -> list[tuple[Usage, Entry] | Entry]:
    """For each case the usage with its entry, or an entry that says why there is none."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(predict, case, kind, directory) for case in cases]
        return [_predicted(case, future) for case, future in zip(cases, futures, strict=True)]


def _predicted(case: Case, future: Future[tuple[Usage, float]]) -> tuple[Usage, Entry] | Entry:
    entry: Entry = {"case": asdict(case)}
    try:
        usage, seconds = future.result()
    except Exception as error:
        return entry | {"failure": {"of": "prediction", "error": _line(error)}}
    return usage, entry | {"predicted": foretold(usage, seconds)}


def run_cases(
    cases: Sequence[Case],
    entries: Sequence[Entry],
    take_one: Callable[[Case, float], dict[str, Any]],
    minutes: float | None,
    begun: float,
    limit_s: float,
    note: Callable[[Case, Entry], None],
) -> None:
    """Measure case after case, as long as there is time.

    take_one  measures a case, within so many seconds
    minutes   since `begun` (of time.monotonic) after which nothing runs; None: there is no such limit
    """
    longest = 0.0
    for case, entry in zip(cases, entries, strict=True):
        started = time.monotonic()
        left = math.inf if minutes is None else begun + 60 * minutes - started
        if left <= longest:  # the next one may take as long as any before
            entry["skipped"] = f"{max(0.0, left):.0f} s of {minutes:g} minutes were left; a case took {longest:.0f}"
        else:
            measured = take_one(case, min(limit_s, left))
            longest = max(longest, time.monotonic() - started)
            if "error" in measured:
                entry.setdefault("failure", {"of": "measurement"} | measured)
            else:
                entry["measured"] = measured
                entry["errors"] = errors_of(entry)
        note(case, entry)


def errors_of(entry: Entry) -> dict[str, float]:
    """predicted / measured - 1, of each figure that there is both of."""
    predicted, measured = entry.get("predicted", {}), entry["measured"]
    times = predicted.get("time", {})
    pairs = {
        "allocated": (predicted.get("allocated_bytes"), measured.get("allocated_bytes")),
        "reserved": (predicted.get("reserved_bytes"), measured.get("reserved_bytes")),
        "tokens_per_second": (times.get("measured", {}).get("tokens_per_second"), measured.get("tokens_per_second")),
        "tokens_per_second_data_sheet": (
            times.get("data_sheet", {}).get("tokens_per_second"),
            measured.get("tokens_per_second"),
        ),
    }
    return {name: said / found - 1 for name, (said, found) in pairs.items() if said is not None and found}


def summary(entries: Sequence[Entry], kind: str) -> dict[str, Any]:
    """How far off the predictions were, and whether that is within the limits.

    A figure passes where the largest error is within its limit, of as many cases as it takes to show anything.
    """
    limits, figures = LIMITS[kind], {}
    for name in FIGURES:
        errors = {n: entry["errors"][name] for n, entry in enumerate(entries, 1) if name in entry.get("errors", {})}
        if not errors and name not in limits:
            continue
        worst = max(errors, key=lambda n: abs(errors[n]), default=None)
        most = abs(errors[worst]) if worst is not None else None
        figures[name] = {
            "cases": len(errors),
            "max": most,
            "median": statistics.median(map(abs, errors.values())) if errors else None,
            "worst_case": worst,
            "limit": limits.get(name),
            "within": sum(abs(error) <= limits[name] for error in errors.values()) if name in limits else None,
            "pass": most is not None and most <= limits[name] and len(errors) >= LEAST[kind]
            if name in limits
            else None,
        }
    return {
        "figures": figures,
        "cases": len(entries),
        "measured": sum("measured" in entry for entry in entries),
        "failed": sum("failure" in entry for entry in entries),
        "skipped": sum("skipped" in entry for entry in entries),
        "pass": all(figure["pass"] for figure in figures.values() if figure["pass"] is not None),
    }


def table(cases: Sequence[Case], entries: Sequence[Entry]) -> Table:
    """The figures that are compared, each predicted, measured, and the error."""
    shown = Table(title="predicted, measured and by how much too much was predicted; GiB, tokens/s")
    kinds = [name for name in FIGURES[:2] if any(f"{name}_bytes" in entry.get("measured", {}) for entry in entries)]
    columns = [column for name in [*kinds, "tokens/s"] for column in (name, "", "")]
    for column in ("", "case", *columns, "by data\nsheet"):
        shown.add_column(column, justify="left" if column == "case" else "right", no_wrap=column != "case")
    for n, (case, entry) in enumerate(zip(cases, entries, strict=True), 1):
        predicted, measured, errors = (entry.get(key, {}) for key in ("predicted", "measured", "errors"))
        times = predicted.get("time", {}).get("measured", {})
        cells = []
        for name in kinds:
            found = measured.get(f"{name}_bytes")
            cells += [_gib(predicted.get(f"{name}_bytes")), _gib(found), _percent(errors.get(name))]
        speeds = [_number(each.get("tokens_per_second")) for each in (times, measured)]
        cells += [*speeds, *(_percent(errors.get(name)) for name in FIGURES[2:])]
        what = f"{case.title}\n{case.knobs}" if case.knobs else case.title
        for key in ("failure", "skipped"):
            if key in entry:
                what += f"\n{key}: {entry[key] if key == 'skipped' else entry[key]['error']}"
        shown.add_row(str(n), what, *cells, end_section=True)
    return shown


def by_category(entries: Sequence[Entry]) -> Table:
    """What the predicted peaks are made of."""
    held: list[Mapping[str, int]] = [entry.get("predicted", {}).get("device", {}) for entry in entries]
    names = sorted({name for each in held for name in each}, key=lambda name: -sum(each.get(name, 0) for each in held))
    shown = Table(title="predicted: what is held at the peak, GiB")
    for column in ("", *(name.replace(", ", ",\n").replace(" ", "\n", 1) for name in names), "slack", "at the peak"):
        shown.add_column(column, justify="left" if column == "at the peak" else "right", no_wrap=True)
    for n, (entry, each) in enumerate(zip(entries, held, strict=True), 1):
        predicted = entry.get("predicted", {})
        cells = [_gib(each.get(name)) for name in names]
        shown.add_row(str(n), *cells, _gib(predicted.get("slack_bytes")), predicted.get("moment", ""))
    return shown


def in_words(rates: Rates) -> str:
    """Rates, on one line."""
    names = ("memory", "bus", "disk", "host_memory")
    speeds = ", ".join(f"{name.replace('_', ' ')} {getattr(rates, name) / 1e9:,.1f}" for name in names)
    return f"{rates.flops / 1e12:,.1f} TFLOP/s; {speeds} GB/s; {rates.launch * 1e6:.1f} us an operation"


def verdicts(found: dict[str, Any]) -> list[str]:
    """The summary, a line for each figure."""
    lines = []
    for name, figure in found["figures"].items():
        label = name.replace("_per_second", "/s").replace("_", " ")
        if not figure["cases"]:
            lines.append(f"{label}: FAIL, nothing was measured")
            continue
        said = (
            f"{label}: off by {figure['max']:.1%} at most (case {figure['worst_case']}), median {figure['median']:.1%}"
        )
        if figure["limit"] is None:
            lines.append(f"{said}; {figure['cases']} cases, no limit")
        else:
            few = figure["max"] <= figure["limit"] and not figure["pass"]
            verdict = "pass" if figure["pass"] else "FAIL, too few" if few else "FAIL"
            lines.append(
                f"{said}; {figure['within']} of {figure['cases']} cases within {figure['limit']:.0%}: {verdict}"
            )
    counts = ", ".join(f"{found[key]} {key}" for key in ("measured", "failed", "skipped"))
    return [*lines, f"{found['cases']} cases: {counts}: {'pass' if found['pass'] else 'FAIL'}"]


def _gib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / GIB:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1%}"


def finite(value: Any) -> Any:
    """The same for JSON, which has no word for infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def chosen(text: str) -> list[int]:
    """`1-3,7` -> [1, 2, 3, 7]"""
    ranges = [part.partition("-") for part in text.split(",")]
    return [n for first, dash, last in ranges for n in range(int(first), int(last if dash else first) + 1)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", choices=tuple(CASES), default="cpu", help="(default: cpu)")
    parser.add_argument("--cases", type=chosen, help="their numbers, as in 1-3,7 (default: all of the device)")
    parser.add_argument("--shape", help="this one in all cases: a name in shapes/, or the path of a config.json")
    parser.add_argument("--cap-gib", type=float, help="most GiB of the device, to act as a smaller card")
    parser.add_argument("--steps", type=int, default=3, help="to time, of each case (default: 3)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--minutes", type=float, help="for everything; cases for which none are left are skipped")
    parser.add_argument("--limit-s", type=float, default=180, help="seconds for each process (default: 180)")
    parser.add_argument("--quick", action="store_true", help="the first cases, a step each, rates measured roughly")
    parser.add_argument("--cache-dir", type=Path, default=ROOT / ".cache" / "predicted", help="for files meanwhile")
    parser.add_argument("--out", type=Path, help="JSON (default: benchmarks/results/predicted_<device>_<date>.json)")
    asked = parser.parse_args()
    if asked.quick:
        asked.steps, asked.warm_up = 1, 1
    everything = CASES[asked.device]
    asked.cases = asked.cases or [*range(1, (QUICK[asked.device] if asked.quick else len(everything)) + 1)]
    if not set(asked.cases) <= set(range(1, len(everything) + 1)):
        parser.error(f"--cases: there are 1 to {len(everything)}")
    if asked.steps < 1 or asked.warm_up < 1:  # the first step makes the optimizer's state
        parser.error("--steps, --warm-up: at least one")
    if asked.device == "cpu" and asked.cap_gib is not None:
        parser.error("--cap-gib: the CPU's allocator takes no cap")
    return asked


def main() -> int:
    begun, asked, console = time.monotonic(), arguments(), Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    kind, directory = asked.device, asked.cache_dir
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "small.json").write_text(json.dumps(SMALL, indent=1))
    about = surroundings(asked.warm_up) | {"device": kind, "cap_gib": asked.cap_gib, "steps": asked.steps}
    out = asked.out or RESULTS / f"predicted_{kind}_{about['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    cases = [_placed(CASES[kind][n - 1], asked.shape, directory) for n in asked.cases]

    here = apart(asked.limit_s, rates_here, kind, directory, 4.0 if asked.quick else 14.0)
    if "error" in here:
        console.print(f"[bold red]the machine's rates could not be measured:[/] {here['error']}")
    rates = {name: here[name] for name in ("measured", "data_sheet") if here.get(name) is not None}
    for name, each in rates.items():
        console.print(f"{name.replace('_', ' ')}: {in_words(each)}")
    workers = max(1, min(8, len(cases), (os.cpu_count() or 1) // 2))
    entries: list[Entry] = []
    for made in predictions(cases, kind, directory, workers):
        usage, entry = made if isinstance(made, tuple) else (None, made)
        if usage is not None:
            entry["predicted"]["time"] = {name: in_time(usage, each) for name, each in rates.items()}
        entries.append(entry)
    console.print(by_category(entries))

    def write() -> None:
        machine = here | {name: asdict(each) for name in ("card", *rates) if (each := here.get(name)) is not None}
        found = {"summary": summary(entries, kind), "machine": machine, "cases": entries}
        out.write_text(json.dumps(finite(about | found), indent=1) + "\n")

    def take_one(case: Case, limit_s: float) -> dict[str, Any]:
        return apart(limit_s, take, case, kind, asked.cap_gib, asked.warm_up, asked.steps, directory)

    def note(case: Case, entry: Entry) -> None:
        said = ", ".join(f"{name} {error:+.1%}" for name, error in entry.get("errors", {}).items())
        said = said or entry.get("skipped") or entry["failure"]["error"]
        console.print(f"{time.monotonic() - begun:4.0f} s  {case.title}  {case.knobs}  {said}", markup=False)
        write()

    write()
    run_cases(cases, entries, take_one, asked.minutes, begun, asked.limit_s, note)
    console.print(table(cases, entries))
    for entry in entries:
        if trace := entry.get("failure", {}).get("traceback"):
            console.print(trace, markup=False)
    found = summary(entries, kind)
    for line in verdicts(found):
        console.print(line, markup=False)
    console.print(f"{here.get('device_name', 'an unknown machine')}; every figure is in {out}")
    return 0 if found["pass"] and not found["failed"] else 1


def _placed(case: Case, shape: str | None, directory: Path) -> Case:
    """A case of another shape, or of the small one where that was written to."""
    name = shape or case.shape
    return replace(case, shape=str(directory / "small.json") if name == "small" else name)


if __name__ == "__main__":
    sys.exit(main())
