"""One optimizer step of ours against the stock stack doing the same work: tokens a second, and memory.

    python benchmarks/step.py                                  SmolLM2-135M, 8 x 128 and 4 x 512 tokens
    python benchmarks/step.py --model DIR --work 16x2048       a directory with safetensors, or a .gguf file

The work: NF4 base with double quantization, LoRA r=16 on all linear layers with fp32 master weights, SDPA, bf16,
gradient checkpointing, k micro-batches of [1, T] random tokens that all carry loss, forward, backward and AdamW.

The stock side is what the documentation of transformers, PEFT and bitsandbytes says, with two choices in its favour:
bf16 autocast around the forward, as `TrainingArguments(bf16=True)` sets it (without it PEFT multiplies the adapter in
fp32), and norms and embeddings stay bf16, where `prepare_model_for_kbit_training` would cast them to fp32.

Each side lives in a process of its own, so that its peak is its own, and a new one for each work. The parent lets them
take a step in turn, never both at once, so that a machine that drifts is slow to both. Both see the same tokens and
start from the same adapter: their first losses must agree, or the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    ALPHA,
    LEARNING_RATE,
    RANK,
    RESULTS,
    SEED,
    forget_peak,
    peak_gib,
    random_batches,
    random_tokens,
    slug,
    spread,
    surroundings,
    synchronize,
    works_of,
)
from rich.console import Console
from rich.table import Table

from qlora.machine import device_name, memory_gib, peak_memory_gib, pick_device

if TYPE_CHECKING:
    import torch
    from torch import nn

MODEL = ".cache/SmolLM2-135M-Instruct.Q4_1.gguf"
WORK = "8x128,4x512"
SIDES = ("ours", "stock")
WARM_UP = 2  # the first steps make the optimizer's state and the allocator's pools
# Relative, on the losses before the first update. B is zero then, so both sides round the same products and were seen
# 7e-8 apart; a kernel that rounds elsewhere moves a token's logit by up to 2^-9, and a thousand tokens average out.
# One token more or less in the denominator of 512 is caught.
TOLERANCE = 2**-10

# Adds a step's gradients and says its loss.
ForwardBackward = Callable[[], float]
Parameters = list["nn.Parameter"]


# --- the two sides ----------------------------------------------------------------------------------------------------


def ours(model: str, device: torch.device, k: int, tokens: int) -> tuple[ForwardBackward, Parameters]:
    """The engine as `qlora train` runs it."""
    from qlora.config import Config
    from qlora.model.adapters import attach, trainable
    from qlora.model.load import load_base
    from qlora.model.source import open_source
    from qlora.train.step import choose

    config = Config.model_validate(
        {
            "model": {"model_name_or_path": model},
            "lora": {"r": RANK, "lora_alpha": ALPHA},
            "data": {"datasets": [{"path": "unused.jsonl"}]},
            "memory": {"nf4_cache_dir": None},  # or what loading takes would depend on the run before
        }
    )
    base = load_base(config, open_source(config.model), device)
    adapted = attach(base.model, config.lora, SEED).train()
    step = choose(base.model, device, config.memory, SEED, ".", print)
    batches = random_batches(base.model.config.vocab_size, k, tokens, device)
    return lambda: step(batches, 0).loss, list(trainable(adapted).values())


def stock(model: str, device: torch.device, k: int, tokens: int) -> tuple[ForwardBackward, Parameters]:
    """transformers + PEFT + bitsandbytes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base: Any = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        device_map={"": device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    base.requires_grad_(False)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    torch.manual_seed(SEED)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(base, lora).train()
    batches = list(random_tokens(base.config.vocab_size, k, tokens, device))
    # As Trainer counts them over the whole accumulation: transformers shifts the labels, so a row's first has no loss.
    supervised = torch.tensor(k * (tokens - 1), device=device)

    def forward_backward() -> float:
        total = torch.zeros((), device=device)
        for ids in batches:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = adapted(input_ids=ids, labels=ids, num_items_in_batch=supervised, use_cache=False).loss
            loss.backward()
            total += loss.detach()
        return total.item()

    return forward_backward, [p for p in adapted.parameters() if p.requires_grad]


# --- one side's process -----------------------------------------------------------------------------------------------


def side_process(pipe: Connection, side: str, model: str, k: int, tokens: int) -> None:
    """Load, report, then a step for each True that comes through the pipe."""
    warnings.filterwarnings("ignore")
    try:
        import torch

        device = pick_device()
        forward_backward, parameters = {"ours": ours, "stock": stock}[side](model, device, k, tokens)
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
        pipe.send(
            {
                "device": device.type,
                "device_name": device_name(device),
                "threads": torch.get_num_threads(),
                "trained": sum(p.numel() for p in parameters),
                "loaded_gib": memory_gib(device),
                "load_peak_gib": peak_gib(device),
            }
        )
        told_apart = forget_peak(device)
        while pipe.recv():
            synchronize(device)
            started = time.perf_counter()
            loss = forward_backward()
            optimizer.step()
            optimizer.zero_grad()
            synchronize(device)
            report = {"seconds": time.perf_counter() - started, "loss": loss, "peak_gib": peak_gib(device)}
            if device.type != "cpu":
                report["reserved_gib"] = peak_memory_gib(device)
            pipe.send(report | {"peaks_told_apart": told_apart})
    except Exception:
        pipe.send({"error": traceback.format_exc()})


# --- the parent -------------------------------------------------------------------------------------------------------


@contextmanager
def started(side: str, model: str, k: int, tokens: int) -> Iterator[Callable[[bool], dict[str, Any]]]:
    """A side in its process. The function gives its next report: with False the load's, with True a step's."""
    context = multiprocessing.get_context("spawn")  # a fork would count this process's memory
    here, there = context.Pipe()
    process = context.Process(target=side_process, args=(there, side, model, k, tokens), name=side)
    process.start()
    there.close()

    def report(step: bool) -> dict[str, Any]:
        if step:
            here.send(True)
        try:
            said = here.recv()
        except EOFError:
            process.join()
            raise SystemExit(f"the process of `{side}` ended with status {process.exitcode}") from None
        if "error" in said:
            raise SystemExit(f"in the process of `{side}`:\n{said['error']}")
        return said

    try:
        yield report
    finally:
        if process.is_alive():
            try:
                here.send(False)
            except OSError:
                process.terminate()
        process.join()


def measure(model: str, k: int, tokens: int, pairs: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Both sides on k micro-batches of `tokens` tokens: every figure as it came, and what follows from them.

    say  is told each pair of steps
    """
    with started("ours", model, k, tokens) as step_ours:
        loaded = {"ours": step_ours(False)}
        with started("stock", model, k, tokens) as step_stock:
            loaded["stock"] = step_stock(False)
            turns = {"ours": step_ours, "stock": step_stock}
            steps: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for n in range(WARM_UP + pairs):
                for side in SIDES:
                    steps[side].append(turns[side](True))
                seconds = "  ".join(f"{side} {steps[side][-1]['seconds']:.3f} s" for side in SIDES)
                say(f"{k} x {tokens}  {'warm-up' if n < WARM_UP else f'pair {n - WARM_UP + 1}/{pairs}'}  {seconds}")
    first = [steps[side][0]["loss"] for side in SIDES]
    timed = {side: [step["seconds"] for step in steps[side][WARM_UP:]] for side in SIDES}
    return {
        "k": k,
        "tokens": tokens,
        "sides": {side: summary(loaded[side], steps[side], k * tokens) for side in SIDES},
        "ratio": spread([b / a for a, b in zip(timed["ours"], timed["stock"], strict=True)]),
        "losses_agree": abs(first[0] - first[1]) <= TOLERANCE * abs(first[1]),
    }


def summary(loaded: dict[str, Any], steps: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """One side's figures: its load's, each step's, and tokens a second over the timed steps."""
    peak = {"load_peak_gib": loaded["load_peak_gib"], "step_peak_gib": steps[-1]["peak_gib"]}
    if "reserved_gib" in steps[-1]:
        peak["reserved_peak_gib"] = steps[-1]["reserved_gib"]
    return {
        **loaded,
        **peak,
        "peaks_told_apart": steps[-1]["peaks_told_apart"],
        "losses": [step["loss"] for step in steps],
        "warm_up_seconds": [step["seconds"] for step in steps[:WARM_UP]],
        "seconds": [step["seconds"] for step in steps[WARM_UP:]],
        "peaks_gib": [step["peak_gib"] for step in steps],
        "tokens_per_second": spread([tokens / step["seconds"] for step in steps[WARM_UP:]]),
    }


def as_directory(model: str, say: Callable[[str], None]) -> str:
    """The model as both sides can read it: transformers does not quantize a .gguf with bitsandbytes, so one becomes a
    directory with safetensors beside it, once."""
    source = Path(model)
    if source.suffix.lower() != ".gguf":
        return model
    directory = source.with_name(source.stem + ".bf16")
    if not directory.is_dir() or directory.stat().st_mtime < source.stat().st_mtime:
        say(f"{source} -> {directory}")
        process = multiprocessing.get_context("spawn").Process(target=convert, args=(source, directory))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{source} was not converted")
    return str(directory)


def convert(source: Path, directory: Path) -> None:
    """A .gguf file to bf16 safetensors, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    partial = directory.with_name(directory.name + ".partial")
    model.save_pretrained(partial)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def table(works: list[dict[str, Any]]) -> Table:
    """What people want to know first."""
    reserved = works[0]["sides"]["ours"]["device"] != "cpu"
    shown = Table(title=f"median, p20-p80; {'VRAM' if reserved else 'RSS'} in GiB; ratio of tokens/s pair by pair")
    columns = ["k x T", "side", "tokens/s", "ratio", "loaded", "load\npeak", "step\npeak"]
    for column in [*columns, *(["reserved"] if reserved else []), "first\nloss"]:
        shown.add_column(column, no_wrap=True)
    for work in works:
        for side in SIDES:
            figures, ratio = work["sides"][side], work["ratio"]
            speed = figures["tokens_per_second"]
            peaks = ["loaded_gib", "load_peak_gib", "step_peak_gib"] + (["reserved_peak_gib"] if reserved else [])
            shown.add_row(
                f"{work['k']} x {work['tokens']}" if side == "ours" else "",
                side,
                f"{speed['median']:.0f} {speed['p20']:.0f}-{speed['p80']:.0f}",
                f"{ratio['median']:.2f} {ratio['p20']:.2f}-{ratio['p80']:.2f}" if side == "ours" else "",
                *(f"{figures[key]:.2f}" for key in peaks),
                f"{figures['losses'][0]:.4f}",
                end_section=side == SIDES[-1],
            )
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default=MODEL, help="directory with safetensors, .gguf file or hub id")
    parser.add_argument("--work", type=works_of, default=WORK, help="micro-batches x tokens, any number of them")
    parser.add_argument("--steps", type=int, default=5, help=f"pairs of steps to time, after {WARM_UP} to warm up")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/step_<device>_<date>.json)")
    asked = parser.parse_args()
    if asked.steps < 1:
        parser.error("--steps: at least one")

    console = Console(highlight=False)
    about = surroundings(WARM_UP) | {"model": asked.model}
    model = as_directory(asked.model, console.print)
    works = [measure(model, k, tokens, asked.steps, console.print) for k, tokens in asked.work]

    side = works[0]["sides"]["ours"]
    out = asked.out or RESULTS / f"step_{slug(side['device'], side['device_name'])}_{about['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(about | {"device": side["device_name"], "works": works}, indent=1) + "\n")
    console.print(table(works))
    console.print(f"{side['device_name']}; every figure is in {out}")
    if not all(figures["peaks_told_apart"] for work in works for figures in work["sides"].values()):
        console.print("this system cannot reset the high-water mark: the step peaks contain the load's")
    apart = [f"{work['k']} x {work['tokens']}" for work in works if not work["losses_agree"]]
    if apart:
        console.print(f"[bold red]THE LOSSES DO NOT AGREE at {', '.join(apart)}: this compares unlike work[/]")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
