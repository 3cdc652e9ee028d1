"""The command line: what it prints and returns, and that a mistake is answered with a sentence and no traceback."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.text import Text

from qlora import run
from qlora.cli import main
from qlora.config import Config, MemoryConfig
from qlora.plan import show
from qlora.plan.cards import machine_for
from qlora.plan.types import Rates
from qlora.recipe import parse_recipe
from qlora.report.terminal import Terminal
from tests import tiny

HEAVY = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "accelerate", "numpy")


@pytest.fixture
def written(checkpoint, tmp_path):
    """A recipe in a file, for a run of two steps; its output is tmp_path/out."""
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny.recipe_text(tiny.chat_model(checkpoint), tmp_path))
    return path


@pytest.fixture
def mistake(capsys):
    """mistake(*arguments) -> what a command that goes wrong says; nothing on the standard output, and no traceback."""

    def call(*arguments):
        assert main([*map(str, arguments)]) == 1
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert said.out == ""
        return said.err

    return call


# --- what does not need a model


def test_help_answers_before_anyone_waits():
    code = (
        "import sys; from qlora.cli import main\n"
        "try: main(['--help'])\n"
        f"finally: print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):  # the best of three: this is about us, not about what else the machine does
        started = time.perf_counter()
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert ran.stderr.strip() == "[]"
    assert min(seconds) < 0.5
    assert all(
        command in ran.stdout for command in ("train", "data", "plan", "runs", "doctor", "bench", "generate", "schema")
    )


def test_schema_is_a_json_schema_that_knows_every_section(capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"].keys() == Config.model_fields.keys()
    assert schema["additionalProperties"] is False and schema["required"] == ["model", "data"]


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["train"], ["train", "r.yaml", "--resume", "--overwrite"], ["plan", "--card", "rtx4090"]],
    ids=str,
)
def test_a_command_that_makes_no_sense_is_answered_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert capsys.readouterr().err.startswith("usage: qlora")


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"qlora {sys.modules['qlora'].__version__}\n"


def test_what_the_package_offers_stays_callable_beside_folders_of_the_same_names():
    code = (
        "import qlora, qlora.plan.cards, qlora.train.step\n"
        "from qlora.plan.cards import find\n"
        "from qlora.plan import cards\n"
        "from qlora import plan, train\n"
        "assert find is cards.find and find('rtx4090').vram_gib == 24\n"
        "assert all(callable(getattr(qlora, name)) for name in set(qlora.__all__) - {'__version__'})\n"
        "print(plan.__module__, plan is qlora.plan, train.__module__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == ("qlora.plan.planner True qlora.run\n", 0), ran.stderr


# --- mistakes


@pytest.mark.parametrize("command", ["train", "data", "plan"])
def test_every_mistake_in_a_recipe_has_its_line(command, mistake, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model:\n  model_name_or_path: x\ndata:\n  datasets: [{path: x}]\ntraining:\n  lerning_rate: 1\n")
    said = mistake(command, path, "--set", "lora.r=wide").splitlines()
    assert said == [
        f"{path}:6: unknown key `training.lerning_rate`",
        "  did you mean `training.learning_rate`?",
        "--set lora.r: `lora.r` expects a whole number, got the text `wide`",
    ]


def test_a_missing_recipe_is_said(mistake, tmp_path):
    assert mistake("train", tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such file\n"


def test_a_missing_model_is_said(mistake, written):
    said = mistake("train", written, "--set", "model.model_name_or_path=./nowhere")
    assert said == "ModelError: ./nowhere: no such directory, and not a hub id (`user/model`) either\n"


@pytest.mark.parametrize("command", ["train", "data"])
def test_a_bad_row_is_said_with_its_line(command, mistake, written, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text() + '{"prompt": "Who?", "completion": 7}\n')
    said = mistake(command, written)
    assert said.startswith("DataError: 1 problem")
    assert f"{rows}:8: `completion`: expected text; got a number, 7" in said
    assert not (tmp_path / "out").exists()


def test_a_directory_without_an_adapter_is_said(mistake, tmp_path):
    assert mistake("generate", tmp_path, "Who?").startswith(f"AdapterError: {tmp_path}: no adapter there")
    said = mistake("generate", tmp_path / "nowhere", "Who?")
    assert said.startswith("AdapterError: ") and "no such directory, and not a name in the library" in said


def test_a_trained_adapter_is_taken_into_the_library_exported_and_asked_by_its_name(
    written, mistake, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    assert main(["train", str(written), "--set", "training.max_steps=1"]) == 0
    assert main(["adapters", "add", str(tmp_path / "out"), "--name", "ada", "--tag", "first"]) == 0
    assert main(["adapters", "list", "--json"]) == 0
    capsys.readouterr()
    assert main(["generate", "ada:first", "Who?", "--max-new-tokens", "2"]) == 0
    exported = tmp_path / "exports"
    assert main(["export", "ada", "--to", "peft", "merged", "gguf-lora", "--out", str(exported), "--force"]) == 0
    assert main(["generate", str(exported / "peft"), "Who?", "--max-new-tokens", "2"]) == 0
    asked, *_, again = capsys.readouterr().out.splitlines()
    assert asked == again
    assert {"peft", "merged"} <= {path.name for path in exported.iterdir()}
    assert (exported / "merged" / "certificate.json").is_file() and (exported / "ada-lora.gguf").is_file()
    assert "eve: no adapter of that name in the library" in mistake("export", "eve", "--to", "merged")
    monkeypatch.chdir(tmp_path / "out" / "checkpoint-1")
    assert main(["export", "..", "--to", "gguf-lora"]) == 0  # of the directory's name, and not above `exports`
    assert Path("exports/out/out-lora.gguf").is_file()


# --- secrets

TOKEN = "hf_AbCdEfGhIjKlMnOp0123"  # known by how it looks
CANARY = "c4nary-in-a-mine"  # known from the environment alone


@pytest.fixture
def secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    return TOKEN, CANARY


@pytest.mark.parametrize("secret", [TOKEN, CANARY])
@pytest.mark.parametrize(
    "change",
    [
        {"hf_token": "{}"},
        {"model": {"token": "{}"}},
        {"lora": {"r": "{}"}},
        {"model": {"model_name_or_path": "https://me:{}@host/model"}},
        {"model": {"model_name_or_path": "./{}"}},
        {"model": {"model_name_or_path": "{}/{}/{}"}},
        {"data": {"datasets": [{"path": "rows.jsonl", "format": "{}"}]}},
        {"data": {"datasets": [{"path": "https://host/rows.jsonl?signature={}"}]}},
        {"data": {"datasets": [{"path": "/nowhere/{}/rows.jsonl"}]}},
        {"training": {"output_dir": "/proc/{}"}},
    ],
    ids=str,
)
def test_no_mistake_in_a_recipe_prints_its_secret(change, secret, secrets, mistake, written, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = json.loads(written.read_text())
    for section, values in json.loads(json.dumps(change).replace("{}", secret)).items():
        recipe[section] = recipe.get(section, {}) | values if isinstance(values, dict) else values
    written.write_text(json.dumps(recipe))
    assert secret not in mistake("train", written)


@pytest.mark.parametrize("secret", [TOKEN, CANARY])
def test_no_mistake_on_the_command_line_prints_its_secret(secret, secrets, mistake, written, capsys):
    said = mistake("train", written, "--set", f"hub.token={secret}", "--set", secret, "--set", f"lora.r={secret}")
    assert "--set hub" in said and "--set lora.r" in said and secret not in said
    assert secret not in mistake("train", f"{secret}.yaml")
    with pytest.raises(SystemExit):
        main(["train", str(written), "--token", secret])
    assert secret not in capsys.readouterr().err


def test_an_error_of_ours_keeps_its_traceback_but_no_secret(secrets, monkeypatch, written, capsys):
    def broken(*_, **__):
        raise KeyError(f"no {TOKEN}") from ValueError(f"nor {CANARY}")

    monkeypatch.setattr(run, "train", broken)
    assert main(["train", str(written)]) == 70
    said = capsys.readouterr().err
    assert "Traceback" in said and "in broken" in said and "KeyError: 'no ***'" in said and "nor ***" in said
    assert TOKEN not in said and CANARY not in said


def test_no_secret_is_in_anything_that_a_run_prints_or_leaves(secrets, checkpoint, tmp_path, monkeypatch, capfd):
    """In the paths of its rows and of its output, in a row, and in the environment."""
    inside = tmp_path / TOKEN / CANARY
    inside.mkdir(parents=True)
    held_out = tiny.write_rows(inside / "held_out.jsonl", [(f"my {TOKEN}", f"is {CANARY}")])
    text = tiny.recipe_text(
        tiny.chat_model(checkpoint),
        inside,
        data={"eval_datasets": [{"path": str(held_out)}], "max_seq_length": 128},
        training={"max_steps": 2, "save_steps": 1, "predict_with_generate": True, "generation_max_length": 4},
    )
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["runs", str(inside)]) == 0
    assert main(["runs", str(inside), "--json"]) == 0
    told = capfd.readouterr()
    left = [path for path in (inside / "out").rglob("*") if path.is_file()]
    assert {"events.jsonl", "recipe.yaml", "run.json", "README.md", "state.json"} <= {path.name for path in left}
    for secret in secrets:
        assert secret not in told.out + told.err
        assert [path.name for path in left if secret.encode() in path.read_bytes()] == []


# --- planning


@pytest.fixture
def planned(capsys):
    """planned(*arguments) -> the screen of `qlora plan`; beside it nothing is said."""

    def call(*arguments):
        assert main(["plan", *map(str, arguments)]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        return said.out

    return call


def test_a_plan_of_a_recipe_is_for_this_machine(written, planned):
    screen = planned(written)
    assert ("CPU" in screen) != torch.accelerator.is_available()
    assert "4 x 64" in screen and "tokens/s" in screen and "lora, r 8" in screen
    assert max(map(len, screen.splitlines())) <= 80


def test_a_plan_for_a_card_needs_no_recipe_and_no_weights(checkpoint, planned, tmp_path):
    model = shutil.copy(checkpoint("llama") / "config.json", tmp_path / "config.json")
    machine = ("--vram", "6", "--host-ram", "12")
    screen = planned("--model", model, "--max-seq-length", "32", *machine, "--set", "memory.activations=host")
    assert str(model) in screen.replace("\n", "") and "8 x 32" in screen and "qlora, r 16" in screen
    assert "of 6.00 GiB free" in screen and "of 8.00" in screen  # of the host the system has 4
    assert "activations: host" in screen and "fixed by the recipe" in screen


def test_another_model_than_the_recipes_is_not_looked_for_at_its_revision(written, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(show, "plan_of", lambda config, machine: seen.append(config.model) or "the screen")
    fixed = ("--set", "model.attn_implementation=eager", "--card", "rtx4090")
    other = "with: spaces, 'quotes' # \\ and 😀"
    recipe = written.read_text().replace('"dtype"', '"revision": "v1", "trust_remote_code": true, "dtype"')
    written.write_text(recipe)
    assert main(["plan", str(written), "--model", other, *fixed]) == 0
    assert main(["plan", str(written), *fixed]) == 0
    elsewhere, own = seen
    assert elsewhere.model_name_or_path == other and own.model_name_or_path in recipe
    assert (elsewhere.revision, elsewhere.trust_remote_code) == (None, False)
    assert (own.revision, own.trust_remote_code) == ("v1", True)
    assert elsewhere.attn_implementation == "eager" and elsewhere.dtype == own.dtype == "float32"
    assert capsys.readouterr().out == "the screen\n" * 2


def test_a_plan_as_json_is_all_of_it_and_nothing_else(written, planned):
    found = json.loads(planned(written, "--card", "4060", "--json"))
    assert found["machine"]["name"] == "RTX 4060" and found["fits"] is True
    assert found["tokens"] == 256 and found["memory"].keys() == MemoryConfig.model_fields.keys()


def test_a_card_that_is_unknown_is_answered_with_the_nearest(mistake, written):
    said = mistake("plan", written, "--card", "rtx490")
    assert said.startswith("MachineError: no figures of a card named `rtx490`\n  did you mean rtx4090")
    assert "--vram must be a number of GiB above 0, got -3" in mistake("plan", written, "--vram", "-3")
    assert "--card rtx4090, --vram 24" in mistake("plan", written, "--host-ram", "64")


def test_what_does_not_fit_or_is_not_there_cannot_be_planned(mistake, written, tmp_path):
    said = mistake("plan", written, "--vram", "0.9", "--set", "memory.order=standard")
    assert said.startswith("PlanError: needs ") and "GiB free" in said
    (tmp_path / "config.json").write_text("{}")
    assert mistake("plan", "--model", tmp_path / "nowhere").startswith(f"ModelError: {tmp_path}/nowhere: ")
    assert mistake("plan", "--model", tmp_path / "config.json").startswith(f"ModelError: {tmp_path}/config.json: ")
    assert "data.max_seq_length" in mistake("plan", written, "--max-seq-length", "1")


def test_a_terminal_gets_the_plan_in_color(written, monkeypatch, capsys):
    monkeypatch.setattr(show, "plan_of", lambda *_: Text("the screen", "bold"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["plan", str(written), "--card", "rtx4090"]) == 0
    assert "\x1b[1mthe screen" in capsys.readouterr().out


def test_the_doctor_says_what_this_machine_is(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["doctor"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.startswith("machine")
    assert "bitsandbytes" in said.out and "`qlora doctor --measure`" in said.out and "`qlora plan RECIPE`" in said.out


def test_the_doctor_measures_remembers_and_says_how_fast_models_train(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rates = Rates(flops=2.5e13, memory=3e11, bus=1.2e10, disk=3.1e9)
    monkeypatch.setattr(show, "measure", lambda *_: rates)
    monkeypatch.setattr(show, "_pace", lambda size, machine: None if size == "14B" else f"{machine.rates.flops:g}")
    assert main(["doctor", "--measure"]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[1:] == [f"planning a model of {size}" for size in ("1B", "8B", "14B")]
    assert "tokens/s: 1B 2.5e+13, 8B 2.5e+13, 14B does not fit; with 8 x 2,048" in said.out
    assert "25 TFLOP/s" in said.out and "not measured" not in said.out
    assert main(["doctor"]) == 0
    assert "25 TFLOP/s" in capsys.readouterr().out  # another day


def test_a_usual_model_is_read_from_disk_where_host_memory_has_no_room_for_it():
    """Its layers are 33 GiB in four bits; of 64 GiB the system has 4, and of 32."""
    large, small = (show._pace("70B", machine_for("rtx3070", host_gib=gib)) for gib in (64, 32))
    assert large is not None and re.fullmatch(r"[\d.]+", large)
    assert small is not None and re.fullmatch(r"[\d.]+ from disk", small)
    assert show._pace("70B", machine_for(None, vram_gib=1.5)) is None


# --- training, and what comes of it


def test_a_run_is_started_refused_resumed_and_overwritten(written, mistake, capsys):
    assert main(["train", str(written), "--set", "training.max_steps=1"]) == 0
    assert "step 1/1" in capsys.readouterr().out
    assert "--resume goes on with it, --overwrite removes it" in mistake("train", written)
    assert main(["train", str(written), "--resume"]) == 0
    told = capsys.readouterr().out
    assert "step 2/2" in told and "step 1/2" not in told
    assert main(["train", str(written), "--overwrite"]) == 0
    assert "step 1/2" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_status_130_and_can_be_resumed(number, written, tmp_path, monkeypatch, capsys):
    class Interrupted(Terminal):
        def __call__(self, event):
            super().__call__(event)
            if event["event"] == "step":
                signal.raise_signal(number)

    monkeypatch.setattr(run, "Terminal", Interrupted)
    assert main(["train", str(written)]) == 130
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.setattr(run, "Terminal", Terminal)
    assert main(["train", str(written), "--resume"]) == 0
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-2")] == ["checkpoint-2"]
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_before_the_first_step_ends_with_status_130_and_no_traceback(written, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_base", lambda *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have
    try:
        assert main(["train", str(written)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.strip().splitlines()[-1] == "interrupted"


def test_data_shows_what_is_learned(written, capsys):
    assert main(["data", str(written), "--samples", "7"]) == 0
    told = capsys.readouterr().out
    assert "prompt-completion" in told
    assert all(said.splitlines()[0] in told for _, said in tiny.PAIRS[:3])


def test_set_overrides_what_the_file_says(written, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "train", lambda config, **how: seen.append((config, how)) or run.Outcome(None, (), None))
    assert main(["train", str(written), "--set", "training.learning_rate=1e-5", "--set", "lora.r=3"]) == 0
    [(config, how)] = seen
    assert (config.training.learning_rate, config.lora.r) == (1e-5, 3)
    assert config.data == parse_recipe(written.read_text()).data
    assert how == {"resume": False, "overwrite": False}


def test_bad_rows_are_skipped_where_that_is_asked_for(written, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "train", lambda config, **how: seen.append(config) or run.Outcome(None, (), None))
    monkeypatch.setattr(run, "show_data", lambda config, samples: seen.append(config))
    for words in (["train"], ["train", "--skip-bad-rows"], ["data", "--skip-bad-rows", "--set", "lora.r=3"]):
        assert main([*words, str(written)]) == 0
    assert main(["train", str(written), "--skip-bad-rows", "--set", "data.skip_bad_rows=false"]) == 0  # the last holds
    assert [config.data.skip_bad_rows for config in seen] == [False, True, True, False]
    assert seen[2].lora.r == 3


@pytest.fixture(scope="module")
def answering(checkpoint, tmp_path_factory):
    """The directory of a model that has one answer by heart."""
    directory = tmp_path_factory.mktemp("answering")
    config = tiny.recipe(tiny.chat_model(checkpoint), directory, pairs=tiny.PAIRS[:1] * 4, training={"max_steps": 12})
    run.train(config, sinks=[])
    return directory / "out"


def test_generate_prints_the_answer_to_its_argument_or_to_standard_input(answering, capsys, monkeypatch):
    asked, said = tiny.PAIRS[0]
    assert main(["generate", str(answering), asked]) == 0
    assert capsys.readouterr().out == f"{said}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{asked}\n"))
    assert main(["generate", str(answering), "-"]) == 0
    assert capsys.readouterr().out == f"{said}\n"
    assert main(["generate", str(answering), asked, "--max-new-tokens", "2"]) == 0
    assert said.startswith(capsys.readouterr().out.strip())


def test_an_adapter_without_our_recipe_answers_too(answering, tmp_path, capsys):
    """As PEFT alone would leave it: its base is then loaded in 4 bits, by the name that it has there."""
    bare = shutil.copytree(answering, tmp_path / "bare")
    for name in ("recipe.yaml", "run.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        (bare / name).unlink()
    assert main(["generate", str(bare), tiny.PAIRS[0][0], "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()
