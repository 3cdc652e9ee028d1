"""Other programs that train the same adapters, where they are installed: Unsloth, torchtune, LLaMA-Factory.

Each runs by itself, in a process of its own under a time limit, and its own logs say what it took. It gets the same
work: NF4 with double quantization, LoRA on all linear layers with lora_alpha = 2 r, bf16, checkpointed activations, the
same optimizer, and rows of random tokens that are filled to the last one, in every step the same k micro-batches.

    unsloth         its public API in a plain loop, which `python -m qlora.bench.peers` runs and reports as JSON lines
    torchtune       tune run lora_finetune_single_device, read from its DiskLogger
    llama-factory   llamafactory-cli train, read from its trainer_log.jsonl

Written after their documentation, and tried against programs that behave as it says: NOT YET RUN AGAINST THE REAL ONES.
What they do not tell apart (waiting, optimizer) is counted as compute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from qlora.bench.results import Loaded, Peaks, Row, Status, StepTaken
from qlora.bench.work import Setup, Work
from qlora.machine import GIB

TREE = Path(__file__).parents[2]  # where the peer's process finds this package
DISTRIBUTIONS = {"unsloth": "unsloth", "torchtune": "torchtune", "llama-factory": "llamafactory"}
SEED, LEARNING_RATE = 0, 2e-4  # as `methods` has them, which would load too much here
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOOK_S = 0.05  # between two looks at what a peer's process holds
OPTIMIZERS = {
    "adamw_torch": "torch.optim.AdamW",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "paged_adamw_8bit": "bitsandbytes.optim.PagedAdamW8bit",
}
# Of torchtune, by `model_type` and whether the embeddings are tied: component builder, type of the checkpoint.
BUILDERS = {
    ("llama", False): ("torchtune.models.llama3.lora_llama3", "LLAMA3"),
    ("llama", True): ("torchtune.models.llama3_2.lora_llama3_2", "LLAMA3_2"),
    ("qwen2", False): ("torchtune.models.qwen2.lora_qwen2", "QWEN2"),
    ("qwen2", True): ("torchtune.models.qwen2.lora_qwen2", "QWEN2"),
}


class CannotMeasure(Exception):
    """A peer that does not do this work."""


class Job(NamedTuple):
    """One run of a peer, in a directory of its own. count: steps, with those to warm up; shape: the model's config."""

    setup: Setup
    work: Work
    count: int
    directory: Path
    shape: Mapping[str, Any]


class Report(NamedTuple):
    """What a peer says of itself. GiB; None: it does not say."""

    steps: list[StepTaken]
    allocated: float | None
    reserved: float | None
    loaded: Loaded | None = None


class Ended(NamedTuple):
    """How a process went. output: its last lines; status: of its exit; host_gib: the most seen resident."""

    status: int
    late: bool
    output: str
    host_gib: float


def installed(method: str) -> str | None:
    """Version of a peer; None where it is not installed. Imports nothing of it."""
    try:
        return importlib.metadata.version(DISTRIBUTIONS[method])
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(
    setup: Setup, work: Work, warm_up: int, steps: int, limit_s: float, directory: Path, say: Callable[[str], None]
) -> Row:
    """Let a peer take warm_up + steps steps, of which the first are not timed.

    limit_s    seconds for all of it, loading included
    directory  gets a folder with all that the peer reads and writes
    say        is told what is run

    Whatever happens to the peer is the row's status.
    """
    row = Row(
        **{f.name: getattr(setup, f.name) for f in dataclasses.fields(setup) if f.name in Row.model_fields},
        **dataclasses.asdict(work),
        status="not installed",
    )
    if installed(setup.method) is None:
        return row
    folder = directory.resolve() / f"{setup.method}-r{setup.r}-{work.k}x{work.rows}x{work.tokens}"
    shutil.rmtree(folder, ignore_errors=True)  # what an earlier run said would be read as this one's
    folder.mkdir(parents=True)
    prepare, read = PEERS[setup.method]
    try:
        job = Job(setup, work, warm_up + steps, folder, _shape_of(setup))
        command, environment = prepare(job)
    except CannotMeasure as reason:
        return row.model_copy(update={"status": "failed", "error": f"{setup.method} {reason}"})
    say(f"{setup.title}, {work}: {' '.join(command)}")
    ended = _run(command, environment, folder, limit_s)
    if ended.late or ended.status:
        said = ended.output.strip().splitlines()
        status: Status = "late" if ended.late else "out of memory" if _is_oom(ended.output) else "failed"
        error = f"after {limit_s:g} s" if ended.late else said[-1] if said else f"ended with status {ended.status}"
        return row.model_copy(update={"status": status, "error": error, "traceback": "\n".join(said[-30:])})
    try:
        report = read(job)
        if len(report.steps) < job.count:
            raise ValueError(f"{len(report.steps)} steps of {job.count}")
    except (OSError, ValueError, KeyError, ZeroDivisionError) as error:
        said = f"{setup.method} ended well, but its log is not what its documentation says: {error!r}"
        return row.model_copy(update={"status": "failed", "error": said, "traceback": ended.output})
    peaks = Peaks(allocated=report.allocated, reserved=report.reserved, host=ended.host_gib, host_told_apart=False)
    taken = {"warm_up": report.steps[:warm_up], "steps": report.steps[warm_up : job.count]}
    return row.model_copy(update={"status": "ok", "peaks": peaks, "loaded": report.loaded, **taken})


def _shape_of(setup: Setup) -> dict[str, Any]:
    """What the model's config.json says. Raises CannotMeasure for all that peers cannot be given."""
    if setup.is_shape:
        raise CannotMeasure("needs a model on disk, not a shape")
    if setup.recipe is not None:
        raise CannotMeasure("is measured on random tokens, not on a recipe's rows")
    if setup.device == "cpu":
        raise CannotMeasure("needs a GPU")
    if setup.vram is not None and setup.method != "unsloth":
        raise CannotMeasure("takes no cap of the GPU's memory")
    if not hasattr(os, "killpg"):
        raise CannotMeasure("is measured where a process can be ended with all that it started, as on Linux")
    try:
        return json.loads((Path(setup.model) / "config.json").read_text())
    except (OSError, ValueError):
        raise CannotMeasure("needs a directory with config.json and safetensors as its model") from None


def _run(command: list[str], environment: Mapping[str, str], folder: Path, limit_s: float) -> Ended:
    """A command in a folder, with everything that it starts ended by `limit_s` seconds."""
    paths = os.pathsep.join(path for path in (str(TREE), os.environ.get("PYTHONPATH")) if path)
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": paths, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # to end it with its children
        )
    deadline, late, held = time.monotonic() + limit_s, False, 0
    try:
        while process.poll() is None and not late:
            # Not what the system says at its end: that has in it what this process held when it started it.
            held = max(held, _resident_bytes(process.pid))
            late = time.monotonic() > deadline
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_S)
    finally:  # Ctrl-C does not reach another session
        with contextlib.suppress(ProcessLookupError):  # all of it has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = (folder / "output.txt").read_bytes()[-20_000:].decode(errors="replace")
    return Ended(process.returncode, late, last, held / GIB)


def _resident_bytes(pid: int) -> int:
    """Of a process and of those that it started."""
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(pid)
        return sum(_resident(each) for each in [first, *first.children(recursive=True)])
    return 0


def _resident(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):  # it ended meanwhile
        return process.memory_info().rss
    return 0


def _is_oom(output: str) -> bool:
    return "out of memory" in output.lower() or "OutOfMemoryError" in output


def _program(name: str) -> str:
    """A command of this environment, or else of the PATH."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise CannotMeasure(f"is installed, but its command `{name}` is nowhere")
    return found


def _step(seconds: float, loss: float, optimizer: float = 0.0) -> StepTaken:
    return StepTaken(
        seconds=seconds, compute=seconds - optimizer, weights=0.0, data=0.0, optimizer=optimizer, loss=loss
    )


def _tokens(vocab: int, work: Work) -> list[Any]:
    """The k micro-batches of every step, each int64 [rows, tokens]: those that our own methods see."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(vocab, (work.rows, work.tokens), generator=generator) for _ in range(work.k)]


def _rows(vocab: int, work: Work, count: int) -> list[list[int]]:
    """The rows of `count` steps in their order."""
    return [row for batch in _tokens(vocab, work) for row in batch.tolist()] * count


# --- torchtune --------------------------------------------------------------------------------------------------------


def _prepare_torchtune(job: Job) -> tuple[list[str], dict[str, str]]:
    setup, shape, work = job.setup, job.shape, job.work
    tied = bool(shape.get("tie_word_embeddings", False))
    if (shape.get("model_type"), tied) not in BUILDERS:
        raise CannotMeasure(f"is not set up here for models of type {shape.get('model_type')}")
    builder, checkpoint = BUILDERS[shape["model_type"], tied]
    rope = shape.get("rope_theta") or shape.get("rope_parameters", {}).get("rope_theta", 10_000)
    model, files = Path(setup.model).resolve(), sorted(file.name for file in Path(setup.model).glob("*.safetensors"))
    tie = f", tie_word_embeddings: {json.dumps(tied)}" if shape["model_type"] == "qwen2" else ""
    config = f"""
model: {{
  _component_: {builder}, vocab_size: {shape["vocab_size"]}, embed_dim: {shape["hidden_size"]},
  num_layers: {shape["num_hidden_layers"]}, num_heads: {shape["num_attention_heads"]},
  num_kv_heads: {shape.get("num_key_value_heads", shape["num_attention_heads"])},
  intermediate_dim: {shape["intermediate_size"]}, norm_eps: {shape["rms_norm_eps"]:f}, rope_base: {int(rope)},
  max_seq_len: {max(shape["max_position_embeddings"], work.tokens)}{tie},
  lora_attn_modules: [q_proj, k_proj, v_proj, output_proj], apply_lora_to_mlp: true, apply_lora_to_output: false,
  lora_rank: {setup.r}, lora_alpha: {2 * setup.r}, lora_dropout: 0.0, quantize_base: true }}
tokenizer: {{ _component_: qlora.bench.peers.torchtune_tokenizer }}
dataset: {{ _component_: qlora.bench.peers.torchtune_rows,
  vocab: {shape["vocab_size"]}, work: {list(dataclasses.astuple(work))}, count: {job.count} }}
seed: {SEED}
shuffle: false
batch_size: {work.rows}
gradient_accumulation_steps: {work.k}
epochs: 1
max_steps_per_epoch: {job.count}
checkpointer: {{ _component_: torchtune.training.FullModelHFCheckpointer, model_type: {checkpoint},
  checkpoint_dir: {json.dumps(str(model))}, checkpoint_files: {json.dumps(files)}, recipe_checkpoint: null,
  output_dir: {json.dumps(str(job.directory / "out"))} }}
resume_from_checkpoint: false
save_adapter_weights_only: true
output_dir: {json.dumps(str(job.directory / "out"))}
optimizer: {{ _component_: {OPTIMIZERS[setup.optim]}, lr: {LEARNING_RATE:f}, weight_decay: 0.0 }}
lr_scheduler: {{ _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 0 }}
loss: {{ _component_: torchtune.modules.loss.CEWithChunkedOutputLoss }}
clip_grad_norm: null
compile: false
metric_logger: {{ _component_: torchtune.training.metric_logging.DiskLogger,
  log_dir: {json.dumps(str(job.directory))}, filename: log.txt }}
log_every_n_steps: 1
log_peak_memory_stats: true
device: {setup.device}
dtype: bf16
enable_activation_checkpointing: true
enable_activation_offloading: false
profiler: {{ _component_: torchtune.training.setup_torch_profiler, enabled: false }}
"""
    (job.directory / "torchtune.yaml").write_text(config.lstrip())
    return [_program("tune"), "run", "lora_finetune_single_device", "--config", "torchtune.yaml"], {}


def torchtune_tokenizer() -> Any:
    """What torchtune's recipe asks a tokenizer for where the rows are tokens already."""
    return type("Tokens", (), {"pad_id": 0, "max_seq_len": None})()


def torchtune_rows(tokenizer: Any, vocab: int, work: list[int], count: int) -> list[dict[str, list[int]]]:
    """The dataset: torchtune shifts the labels itself."""
    return [{"tokens": row, "labels": list(row)} for row in _rows(vocab, Work(*work), count)]


def _read_torchtune(job: Job) -> Report:
    """Lines as `Step 3 | loss:1.25 lr:0.0002 tokens_per_second_per_gpu:812.5 peak_memory_alloc:3.25 ...`, in GiB."""
    lines = (job.directory / "log.txt").read_text().splitlines()
    logged = [dict(re.findall(r"(\w+):(\S+)", line)) for line in lines if line.startswith("Step ")]
    logged = [figures for figures in logged if "loss" in figures]
    seconds = [job.work.tokens_per_step / float(figures["tokens_per_second_per_gpu"]) for figures in logged]
    steps = [_step(each, float(figures["loss"])) for each, figures in zip(seconds, logged, strict=True)]
    allocated, reserved = (
        max((float(figures[name]) for figures in logged if name in figures), default=None)
        for name in ("peak_memory_alloc", "peak_memory_reserved")
    )
    return Report(steps, allocated, reserved)


# --- LLaMA-Factory ----------------------------------------------------------------------------------------------------


def _prepare_llama_factory(job: Job) -> tuple[list[str], dict[str, str]]:
    setup, work = job.setup, job.work
    from datasets import Dataset, DatasetDict

    rows = _rows(job.shape["vocab_size"], work, job.count)
    columns = {"input_ids": rows, "attention_mask": [[1] * work.tokens] * len(rows), "labels": rows}
    DatasetDict({"train": Dataset.from_dict(columns)}).save_to_disk(str(job.directory / "tokenized"))
    # `dataset` has to have a name; what is read is `tokenized_path`. In stage `pt` every token carries loss.
    config = f"""
model_name_or_path: {json.dumps(str(Path(setup.model).resolve()))}
quantization_bit: 4
quantization_method: bitsandbytes
quantization_type: nf4
double_quantization: true
flash_attn: sdpa
stage: pt
do_train: true
finetuning_type: lora
lora_target: all
lora_rank: {setup.r}
lora_alpha: {2 * setup.r}
lora_dropout: 0.0
dataset: rows
tokenized_path: tokenized
cutoff_len: {work.tokens}
disable_shuffling: true
output_dir: out
save_strategy: "no"
report_to: none
logging_steps: 1
include_num_input_tokens_seen: true
per_device_train_batch_size: {work.rows}
gradient_accumulation_steps: {work.k}
max_steps: {job.count}
learning_rate: {LEARNING_RATE:f}
optim: {setup.optim}
bf16: true
seed: {SEED}
"""
    (job.directory / "llama_factory.yaml").write_text(config.lstrip())
    return [_program("llamafactory-cli"), "train", "llama_factory.yaml"], {"RECORD_VRAM": "1"}  # the log says the peaks


def _read_llama_factory(job: Job) -> Report:
    """A JSON line a step. `throughput` is of all tokens since the start: a step took what its quotients differ by."""
    lines = [json.loads(line) for line in (job.directory / "out" / "trainer_log.jsonl").read_text().splitlines()]
    logged = [figures for figures in lines if "loss" in figures]
    ends = [0.0, *(figures["total_tokens"] / figures["throughput"] for figures in logged)]
    steps = [_step(end - start, figures["loss"]) for start, end, figures in zip(ends, ends[1:], logged, strict=False)]
    allocated, reserved = (
        max((figures[name] for figures in logged if name in figures), default=None)
        for name in ("vram_allocated", "vram_reserved")
    )
    return Report(steps, allocated, reserved)


# --- Unsloth ----------------------------------------------------------------------------------------------------------


def _prepare_unsloth(job: Job) -> tuple[list[str], dict[str, str]]:
    setup, work = job.setup, dataclasses.astuple(job.work)
    asked = {"model": str(Path(setup.model).resolve()), "vocab": job.shape["vocab_size"], "work": work}
    asked |= {"r": setup.r, "optim": setup.optim, "device": setup.device, "vram": setup.vram, "count": job.count}
    (job.directory / "job.json").write_text(json.dumps(asked))
    return [sys.executable, "-m", "qlora.bench.peers", "job.json", "steps.jsonl"], {}


def _read_unsloth(job: Job) -> Report:
    first, *steps = (json.loads(line) for line in (job.directory / "steps.jsonl").read_text().splitlines())
    allocated, reserved = (max(step[name] or 0 for step in steps) or None for name in ("allocated", "reserved"))
    taken = [_step(step["seconds"], step["loss"], step["optimizer"]) for step in steps]
    return Report(taken, allocated, reserved, Loaded(**first))


def drive_unsloth(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Load and train as Unsloth's documentation says, in this process: what loading took, then each step.

    job  as job.json has it
    """
    started = time.perf_counter()
    fast = importlib.import_module("unsloth").FastLanguageModel  # before all that it changes
    import torch

    from qlora.machine import peak_memory_gib

    device, work = torch.device(job["device"]), Work(*job["work"])
    gpu = torch.cuda if device.type == "cuda" else None
    if gpu is not None and job["vram"] is not None:
        gpu.set_per_process_memory_fraction(min(job["vram"] * GIB / gpu.get_device_properties(0).total_memory, 1.0))
    model, _ = fast.from_pretrained(
        model_name=job["model"], max_seq_length=work.tokens, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = fast.get_peft_model(
        model,
        r=job["r"],
        target_modules=TARGETS,
        lora_alpha=2 * job["r"],
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=SEED,
    ).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    package, _, name = OPTIMIZERS[job["optim"]].rpartition(".")
    optimizer = getattr(importlib.import_module(package), name)(trained, lr=LEARNING_RATE, weight_decay=0.0)
    batches = [ids.to(device) for ids in _tokens(job["vocab"], work)]
    yield {
        "seconds": time.perf_counter() - started,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),  # two four-bit ones count as one
        "trained": sum(parameter.numel() for parameter in trained),
        "host_peak_gib": peak_memory_gib(torch.device("cpu")),
        "device_gib": gpu.memory_allocated() / GIB if gpu else None,
        "device_peak_gib": gpu.max_memory_allocated() / GIB if gpu else None,
        "facts": {"unsloth": installed("unsloth")},
    }

    def clock() -> float:
        if gpu is not None:
            gpu.synchronize()
        return time.perf_counter()

    if gpu is not None:
        gpu.reset_peak_memory_stats()
    for _ in range(job["count"]):
        started, total = clock(), torch.zeros((), device=device)
        for ids in batches:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss / work.k
            loss.backward()
            total += loss.detach()
        computed = clock()
        optimizer.step()
        optimizer.zero_grad()
        ended = clock()
        yield {
            "seconds": ended - started,
            "optimizer": ended - computed,
            "loss": total.item(),
            "allocated": gpu.max_memory_allocated() / GIB if gpu else None,
            "reserved": gpu.max_memory_reserved() / GIB if gpu else None,
        }


PEERS: dict[str, tuple[Callable[[Job], tuple[list[str], dict[str, str]]], Callable[[Job], Report]]] = {
    "unsloth": (_prepare_unsloth, _read_unsloth),
    "torchtune": (_prepare_torchtune, _read_torchtune),
    "llama-factory": (_prepare_llama_factory, _read_llama_factory),
}


if __name__ == "__main__":
    job_file, steps_file = (Path(word) for word in sys.argv[1:])
    with steps_file.open("w") as file:
        for line in drive_unsloth(json.loads(job_file.read_text())):
            print(json.dumps(line), file=file, flush=True)
