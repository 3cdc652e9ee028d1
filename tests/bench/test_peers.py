"""Other programs are given the same work and their logs are read, however they end.

The programs here are false ones, which behave as the documentation of the real ones says.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from datasets import load_from_disk

from qlora.bench import methods, peers
from qlora.bench.work import Setup, Work
from qlora.model.batch import Batch

WORK = Work(2, 3, 16)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(method, command, source): a false program on the PATH, with its distribution beside it."""

    def make(method: str, command: str, source: str, version: str = "1.2.3") -> None:
        site, name = tmp_path / "site", peers.DISTRIBUTIONS[method]
        about = site / f"{name}-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        program = site / command
        program.write_text(f"#!{sys.executable} -S\n{source}")
        program.chmod(0o755)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setenv("PATH", str(site), prepend=os.pathsep)
        monkeypatch.setenv("PYTHONPATH", str(site))

    return make


@pytest.fixture(scope="module")
def model(checkpoint) -> Path:
    return checkpoint("llama")


def setup_of(method: str, directory: Path, **changes) -> Setup:
    values: dict[str, Any] = {
        "name": method,
        "method": method,
        "model": str(directory),
        "is_shape": False,
        "r": 8,
        "device": "cuda",
    }
    values |= {"optim": "adamw_torch"} | changes
    return Setup(**values)


def measure(method: str, directory: Path, tmp_path: Path, limit_s: float = 30.0, **changes):
    setup = setup_of(method, directory, **changes)
    return peers.measure(setup, WORK, 1, 2, limit_s, tmp_path / "runs", lambda text: None)


TUNE = """
import sys
assert sys.argv[1:4] == ["run", "lora_finetune_single_device", "--config"]
print("Writing logs to log.txt")
with open("log.txt", "w") as log:
    for step in (1, 2, 3):
        log.write(f"Step {step} | loss:{5 - step} lr:0.0002 tokens_per_second_per_gpu:{96.0 * step} "
                  f"peak_memory_active:3.5 peak_memory_alloc:{3 + step / 4} peak_memory_reserved:6.5 \\n")
"""

FACTORY = """
import json, os, sys
assert sys.argv[1] == "train" and os.environ["RECORD_VRAM"] == "1"
os.makedirs("out")
with open(os.path.join("out", "trainer_log.jsonl"), "w") as log:
    for step, ended in ((1, 2.0), (2, 2.5), (3, 3.0)):
        line = {"current_steps": step, "loss": 5 - step, "throughput": 96 * step / ended, "total_tokens": 96 * step}
        log.write(json.dumps(line | {"vram_allocated": 3.75, "vram_reserved": 6.5}) + "\\n")
    log.write(json.dumps({"current_steps": 3, "elapsed_time": "0:00:03"}) + "\\n")
"""

PROGRAMS = {"torchtune": ("tune", TUNE), "llama-factory": ("llamafactory-cli", FACTORY)}


@pytest.mark.parametrize("method", peers.DISTRIBUTIONS)
def test_a_peer_that_is_not_there_is_not_installed(method, model, tmp_path):
    assert peers.installed(method) is None
    row = measure(method, model, tmp_path)
    assert (row.status, row.steps, row.k, row.rows, row.tokens, row.r) == ("not installed", [], 2, 3, 16, 8)


@pytest.mark.parametrize(("method", "seconds"), [("torchtune", (1.0, 0.5, 1 / 3)), ("llama-factory", (2.0, 0.5, 0.5))])
def test_a_log_becomes_a_row(method, seconds, install, model, tmp_path):
    command, source = PROGRAMS[method]
    install(method, command, source + "import time\ntime.sleep(0.5)  # for its memory to be seen\n")
    assert peers.installed(method) == "1.2.3"
    row = measure(method, model, tmp_path)
    assert (row.status, row.error) == ("ok", None)
    assert row.losses == [4, 3, 2]
    assert [step.seconds for step in [*row.warm_up, *row.steps]] == pytest.approx(seconds)
    assert len(row.steps) == 2
    assert row.peaks is not None
    assert (row.peaks.allocated, row.peaks.reserved) == (3.75, 6.5)
    assert 0.001 < row.peaks.host < 1  # GiB of a bare Python


CRASH = "import sys\nprint('loading', flush=True)\nsys.exit('ValueError: no such thing')\n"
OOM = "import sys\nsys.exit('torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB')\n"


@pytest.mark.parametrize(
    ("source", "status", "error"),
    [(CRASH, "failed", "ValueError: no such thing"), (OOM, "out of memory", "Tried to allocate 2.00 GiB")],
)
@pytest.mark.parametrize("method", PROGRAMS)
def test_a_peer_that_breaks_is_a_row_with_its_last_words(method, source, status, error, install, model, tmp_path):
    install(method, PROGRAMS[method][0], source)
    row = measure(method, model, tmp_path)
    assert row.status == status
    assert (row.error or "").endswith(error)
    assert row.peaks is None


def test_a_peer_that_takes_too_long_is_ended_with_its_children(install, model, tmp_path):
    note = tmp_path / "child"
    source = f"import subprocess, time\nchild = subprocess.Popen(['sleep', '60'])\nopen({str(note)!r}, 'w').write("
    install("torchtune", "tune", source + "str(child.pid))\nprint('loading', flush=True)\ntime.sleep(60)\n")
    started = time.monotonic()
    row = measure("torchtune", model, tmp_path, limit_s=2.0)
    assert (row.status, row.error, row.traceback) == ("late", "after 2 s", "loading")
    while is_alive(int(note.read_text())):
        assert time.monotonic() - started < 20


def is_alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_log_that_is_not_as_documented_is_a_failure_and_no_figure(install, model, tmp_path):
    install("torchtune", "tune", "open('log.txt', 'w').write('Step 1 | loss:2.0 speed:17 \\n')\n")
    row = measure("torchtune", model, tmp_path)
    assert row.status == "failed"
    assert "tokens_per_second_per_gpu" in (row.error or "")


def test_what_an_earlier_run_said_is_not_read_again(install, model, tmp_path):
    install("torchtune", "tune", TUNE)
    assert measure("torchtune", model, tmp_path).status == "ok"
    (tmp_path / "site" / "tune").write_text(f"#!{sys.executable} -S\n")
    assert measure("torchtune", model, tmp_path).status == "failed"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"is_shape": True}, "needs a model on disk, not a shape"),
        ({"device": "cpu"}, "needs a GPU"),
        ({"vram": 8.0}, "takes no cap"),
        ({"recipe": "a.yaml"}, "random tokens"),
        ({"model": "some/hub-id"}, "needs a directory"),
    ],
)
def test_what_a_peer_cannot_do_is_said_and_nothing_is_run(changes, error, install, model, tmp_path):
    install("torchtune", "tune", TUNE)
    row = measure("torchtune", model, tmp_path, **changes)
    assert row.status == "failed"
    assert error in (row.error or "")


def test_torchtune_gets_the_same_work(install, model, tmp_path):
    install("torchtune", "tune", TUNE)
    measure("torchtune", model, tmp_path, optim="paged_adamw_8bit")
    config = yaml.safe_load((tmp_path / "runs" / "torchtune-r8-2x3x16" / "torchtune.yaml").read_text())
    assert (config["batch_size"], config["gradient_accumulation_steps"], config["max_steps_per_epoch"]) == (3, 2, 3)
    assert (config["model"]["lora_rank"], config["model"]["lora_alpha"]) == (8, 16)
    assert config["model"]["quantize_base"] is True
    assert config["optimizer"]["_component_"] == "bitsandbytes.optim.PagedAdamW8bit"
    shape = json.loads((model / "config.json").read_text())
    assert config["model"]["num_layers"] == shape["num_hidden_layers"]
    assert config["model"]["norm_eps"] == pytest.approx(shape["rms_norm_eps"])
    assert all((model / name).is_file() for name in config["checkpointer"]["checkpoint_files"])
    given = {name: value for name, value in config["dataset"].items() if name != "_component_"}
    rows = peers.torchtune_rows(peers.torchtune_tokenizer(), **given)
    assert len(rows) == 3 * 2 * 3
    assert all(len(row["tokens"]) == 16 and row["labels"] == row["tokens"] for row in rows)


def test_llama_factory_gets_the_same_work(install, model, tmp_path):
    install("llama-factory", "llamafactory-cli", FACTORY)
    measure("llama-factory", model, tmp_path)
    folder = tmp_path / "runs" / "llama-factory-r8-2x3x16"
    config = yaml.safe_load((folder / "llama_factory.yaml").read_text())
    assert (config["per_device_train_batch_size"], config["gradient_accumulation_steps"]) == (3, 2)
    assert (config["max_steps"], config["lora_rank"], config["lora_alpha"]) == (3, 8, 16)
    assert (config["quantization_bit"], config["double_quantization"], config["learning_rate"]) == (4, True, 2e-4)
    rows: Any = load_from_disk(str(folder / config["tokenized_path"]))
    assert [len(ids) for ids in rows["train"]["input_ids"]] == [16] * (3 * 2 * 3)


def test_peers_see_the_tokens_that_our_own_methods_see():
    ours: list[Batch] = methods._random(WORK, 128)
    assert all(torch.equal(a.input_ids, b) for a, b in zip(ours, peers._tokens(128, WORK), strict=True))
    assert (peers.SEED, peers.LEARNING_RATE) == (methods.SEED, methods.LEARNING_RATE)


UNSLOTH = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length, dtype, load_in_4bit):
        assert load_in_4bit and max_seq_length == 16
        return AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype), None

    @staticmethod
    def get_peft_model(model, r, target_modules, lora_alpha, lora_dropout, bias, use_gradient_checkpointing,
                       random_state):
        torch.manual_seed(random_state)
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules))
"""


def test_unsloth_is_driven_through_its_public_api(tmp_path, monkeypatch, model):
    (tmp_path / "unsloth.py").write_text(UNSLOTH)
    monkeypatch.syspath_prepend(str(tmp_path))
    job = peers.Job(setup_of("unsloth", model, device="cpu"), WORK, 3, tmp_path, {"vocab_size": 128})
    peers._prepare_unsloth(job)
    try:
        said = list(peers.drive_unsloth(json.loads((tmp_path / "job.json").read_text())))
    finally:
        sys.modules.pop("unsloth", None)
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    report = peers._read_unsloth(job)
    losses = [step.loss for step in report.steps]
    assert losses[0] == pytest.approx(torch.tensor(128.0).log().item(), rel=0.5)  # of random weights on random tokens
    assert losses[0] > losses[1] > losses[2]  # the same rows again and again
    assert report.loaded is not None
    assert 0 < report.loaded.trained < report.loaded.parameters
    assert all(step.seconds > step.optimizer > 0 for step in report.steps)


def test_unsloth_runs_in_a_process_of_its_own_and_its_end_is_told(install, model, tmp_path):
    install("unsloth", "unsloth.py", "raise RuntimeError('CUDA error: out of memory')\n")
    row = measure("unsloth", model, tmp_path)
    assert (row.status, row.error) == ("out of memory", "RuntimeError: CUDA error: out of memory")
