"""The main path, whole: recipe in, adapter out, on tiny models; and what it does when it is stopped or cannot go on."""

import hashlib
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import qlora
from qlora import run
from qlora.config import Config, LoraSection
from qlora.errors import AdapterError, CheckpointError, DataError, MachineError, NonFiniteLossError, TrainingError
from qlora.lock import Lock
from qlora.report.events import read_events
from tests import tiny


def train(config, *more, **how):
    """A run, and all that it told. more: further sinks."""
    events = []
    return run.train(config, sinks=[events.append, *more], **how), events


def of(events, kind):
    return [event for event in events if event["event"] == kind]


def changed(config, **sections):
    """The same recipe with some values changed: changed(config, lora={"r": 16}), changed(config, method="full")."""
    values = config.model_dump(mode="json")
    for name, change in sections.items():
        values[name] = values[name] | change if isinstance(change, dict) else change
    return Config.model_validate(values)


def signalling(number, at):
    """A sink that sends this process a signal in the middle of step `at`."""

    def sink(event):
        if event["event"] == "step" and event["step"] == at:
            signal.raise_signal(number)

    return sink


# --- stopped and resumed


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_stopped_and_resumed_is_bit_for_bit_as_if_it_had_never_stopped(optim, packing, checkpoint, tmp_path):
    def config(name):
        (tmp_path / name).mkdir()
        return tiny.recipe(
            tiny.chat_model(checkpoint),
            tmp_path / name,
            lora={"r": 32, "lora_dropout": 0.3},  # of rank 32 some matrices are large enough for 8-bit state
            data={"packing": packing, "eval_fraction": 0.2},
            training={
                "optim": optim,
                "per_device_train_batch_size": 1 if packing else 2,
                "gradient_accumulation_steps": 1,
                "num_train_epochs": 2.5,
                "lr_scheduler_type": "cosine",
            },
        )

    straight, broken = config("straight"), config("broken")
    whole, expected = train(straight)
    first, events = train(broken, signalling(signal.SIGINT, 2))
    second, more = train(broken, signalling(signal.SIGTERM, 5), resume=True)
    third, rest = train(broken, resume=True)

    assert [each.stopped for each in (whole, first, second, third)] == [None, "interrupted", "interrupted", None]
    assert [each.progress.step for each in (first, second, third)] == [2, 5, whole.progress.step]
    assert [event["first_step"] for event in of([*events, *more, *rest], "start")] == [0, 2, 5]
    found = of([*events, *more, *rest], "step")
    assert {math.ceil(event["epoch"]) for event in found} == {1, 2, 3}
    for key in ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised"):
        assert [event[key] for event in found] == [event[key] for event in of(expected, "step")], key
    assert of(rest, "evaluation")[0]["eval_loss"] == of(expected, "evaluation")[0]["eval_loss"]
    there, here = (tmp_path / name / "out" for name in ("straight", "broken"))
    assert (there / "adapter_model.safetensors").read_bytes() == (here / "adapter_model.safetensors").read_bytes()
    assert not of([*events, *more, *rest], "notice")  # nothing about it is worth a word
    if optim == "adamw_8bit":
        with safe_open(here / "checkpoint-5" / "optimizer.safetensors", framework="pt") as f:
            kept = {f.get_slice(key).get_dtype() for key in f.keys() if key.endswith("state1")}  # noqa: SIM118
        assert kept == {"U8", "F32"}


def test_an_interrupted_run_leaves_its_adapter_and_does_not_make_anyone_wait_for_an_evaluation(checkpoint, tmp_path):
    config = tiny.recipe(
        tiny.chat_model(checkpoint),
        tmp_path,
        data={"eval_fraction": 0.2},
        training={"num_train_epochs": 3.0, "eval_steps": 1, "predict_with_generate": True},
    )
    _, events = train(config, signalling(signal.SIGINT, 2))
    assert [event["step"] for event in of(events, "evaluation")] == [1]
    assert [event["step"] for event in of(events, "generation")] == [0]
    assert of(events, "end")[0]["stopped"] == "interrupted"
    assert isinstance(qlora.generate(tmp_path / "out", "Who?", max_new_tokens=2), str)


@pytest.fixture(scope="module")
def halfway(checkpoint, tmp_path_factory):
    """The recipe of a run of four steps that was stopped in the second."""
    directory = tmp_path_factory.mktemp("halfway")
    config = tiny.recipe(tiny.chat_model(checkpoint), directory, training={"num_train_epochs": 2.0})
    train(config, signalling(signal.SIGINT, 2))
    return config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "full"}, "  method: `lora` there, `full` here"),
        ({"lora": {"r": 4}}, "  lora.r: `8` there, `4` here"),
        ({"data": {"max_seq_length": 40}}, "  data.max_seq_length: `64` there, `40` here"),
        ({"training": {"seed": 7}}, "  training.seed: `42` there, `7` here"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_run_on_another_base_adapter_or_data_is_not_resumed(change, said, halfway):
    with pytest.raises(CheckpointError, match="checkpoint-2: belongs to another run") as raised:
        train(changed(halfway, **change), resume=True)
    assert said in str(raised.value).splitlines()


def test_a_run_whose_base_rows_or_template_were_exchanged_is_not_resumed(halfway, tmp_path):
    """Under the same names, as when a model is trained on and saved over itself."""
    other_base = shutil.copytree(halfway.model.model_name_or_path, tmp_path / "other")
    weights = load_file(other_base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other_base / "model.safetensors", {"format": "pt"})
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [*tiny.PAIRS[:-1], ("Who?", "Bob")])
    template = AutoTokenizer.from_pretrained(other_base).chat_template
    other = changed(
        halfway,
        model={"model_name_or_path": str(other_base)},
        data={"datasets": [{"path": str(rows)}], "chat_template": "{# other #}" + template},
    )
    with pytest.raises(CheckpointError) as raised:
        train(other, resume=True)
    keys = [line.split(":")[0].strip() for line in str(raised.value).splitlines()[1:]]
    assert (
        {"chat_template", "data.rows", "data.tokens", "model.fingerprint"}
        <= {*keys}
        <= {*("chat_template", "data.rows", "data.tokens", "data.order", "model.fingerprint")}
    )


def test_a_run_whose_base_has_moved_is_resumed_and_that_is_said(halfway, tmp_path):
    output = shutil.copytree(halfway.training.output_dir, tmp_path / "out")
    moved = shutil.copytree(halfway.model.model_name_or_path, tmp_path / "other")
    again = changed(halfway, model={"model_name_or_path": str(moved)}, training={"output_dir": str(output)})
    outcome, events = train(again, resume=True)
    assert outcome.stopped is None
    [said] = [event["text"] for event in of(events, "notice")]
    assert said.startswith("set otherwise than in checkpoint-2:\n")
    assert "  model_name_or_path: " in said and "training.output_dir" in said


def test_a_run_is_resumed_with_another_learning_rate_and_more_epochs(halfway, tmp_path):
    output = shutil.copytree(halfway.training.output_dir, tmp_path / "out")
    longer = changed(
        halfway,
        training={
            "output_dir": str(output),
            "num_train_epochs": 4.0,
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
        },
    )
    outcome, events = train(longer, resume=True)
    assert outcome.stopped is None
    assert [event["step"] for event in of(events, "step")] == [3, 4, 5, 6, 7, 8]
    assert {event["learning_rate"] for event in of(events, "step")} == {0.5}
    [said] = [event["text"] for event in of(events, "notice")]
    assert "  training.learning_rate: `0.01` there, `0.5` here" in said.splitlines()


def test_without_a_checkpoint_there_is_nothing_to_resume_and_nothing_is_made(checkpoint, tmp_path):
    config = tiny.recipe(tiny.chat_model(checkpoint), tmp_path)
    with pytest.raises(CheckpointError, match="has no checkpoint to resume from; without --resume the run starts"):
        train(config, resume=True)
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_passed_over_with_a_word_and_the_one_before_it_gives_the_same_run(checkpoint, tmp_path):
    def config(name):
        (tmp_path / name).mkdir()
        return tiny.recipe(tiny.chat_model(checkpoint), tmp_path / name, training={"save_steps": 1, "max_steps": 5})

    straight, broken = config("straight"), config("broken")
    _, expected = train(straight)
    train(broken, signalling(signal.SIGINT, 3))
    weights = tmp_path / "broken" / "out" / "checkpoint-3" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    _, events = train(broken, resume=True)
    [said] = [event["text"] for event in of(events, "notice")]
    assert said.startswith("checkpoint-3: weights.safetensors has ") and said.endswith("; it is passed over")
    assert of(events, "start")[0]["first_step"] == 2
    assert [e["loss"] for e in of(events, "step")] == [e["loss"] for e in of(expected, "step")][2:]
    there, here = (tmp_path / name / "out" / "adapter_model.safetensors" for name in ("straight", "broken"))
    assert there.read_bytes() == here.read_bytes()


def test_a_second_run_in_the_same_directory_is_refused_until_the_first_has_ended(halfway, tmp_path):
    output = shutil.copytree(halfway.training.output_dir, tmp_path / "out")
    again = changed(halfway, training={"output_dir": str(output)})
    with Lock(output), pytest.raises(TrainingError, match=f"a run is going on there: process {os.getpid()} on .*\n"):
        train(again, resume=True)
    assert train(again, resume=True)[0].stopped is None


def test_a_signal_during_the_last_evaluation_leaves_the_adapter_without_waiting_for_it(checkpoint, tmp_path):
    config = tiny.recipe(
        tiny.chat_model(checkpoint), tmp_path, data={"eval_fraction": 0.2}, training={"predict_with_generate": True}
    )

    def after_the_loop(event):
        if event["event"] == "evaluation":
            signal.raise_signal(signal.SIGTERM)

    outcome, events = train(config, after_the_loop)
    assert outcome.stopped is None and [event["step"] for event in of(events, "generation")] == [0]
    assert "cut short" in of(events, "notice")[-1]["text"]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_what_is_recorded_of_a_run_names_no_secret(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "canary" * 5)
    secret = tmp_path / ("hf_" + "canary" * 5)
    secret.mkdir()
    config = tiny.recipe(tiny.chat_model(checkpoint), secret, training={"output_dir": str(tmp_path / "out")})
    train(config)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"state.json", "recipe.yaml", "README.md", "run.json", "events.jsonl"} <= {path.name for path in written}
    assert not [path for path in written if b"canary" in path.read_bytes()]


def test_what_a_killed_save_left_is_cleaned_away(halfway, tmp_path):
    output = shutil.copytree(halfway.training.output_dir, tmp_path / "out")
    left = output / ".checkpoint-3.4711.unfinished"
    left.mkdir()
    (left / "weights.safetensors").write_bytes(b"half")
    train(changed(halfway, training={"output_dir": str(output)}), resume=True)
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []


# --- a directory with an earlier run


def test_two_runs_do_not_mix_in_one_directory(halfway, tmp_path):
    with pytest.raises(CheckpointError, match="holds a run already") as raised:
        train(halfway)
    hint = str(raised.value).splitlines()[1]
    assert "--resume goes on with it, --overwrite removes it" in hint
    output = shutil.copytree(halfway.training.output_dir, tmp_path / "out")
    shutil.rmtree(output / "checkpoint-2")  # an adapter is worth as much without the checkpoints it came from
    with pytest.raises(CheckpointError, match="holds a run already\n  --overwrite removes it"):
        train(changed(halfway, training={"output_dir": str(output)}))


def test_overwriting_leaves_nothing_of_the_earlier_run(halfway, tmp_path):
    output = shutil.copytree(halfway.training.output_dir, tmp_path / "out")
    (output / "notes.txt").write_text("mine")
    config = changed(halfway, method="full", training={"output_dir": str(output), "max_steps": 1})
    train(config, overwrite=True)
    names = {path.name for path in output.iterdir()}
    assert names.isdisjoint({"checkpoint-2", "adapter_config.json", "adapter_model.safetensors"})
    assert names > {"notes.txt", "checkpoint-1", "model.safetensors", "config.json"}
    assert [event["step"] for event in read_events(output / "events.jsonl") if event["event"] == "step"] == [1]
    assert isinstance(qlora.generate(output, "Who?", max_new_tokens=2), str)


def test_a_mistake_in_the_data_costs_nobody_an_earlier_run(halfway, tmp_path):
    output = shutil.copytree(halfway.training.output_dir, tmp_path / "out")
    before = sorted(output.rglob("*"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Who?"}\n')
    config = changed(halfway, data={"datasets": [{"path": str(bad)}]}, training={"output_dir": str(output)})
    with pytest.raises(DataError):
        train(config, overwrite=True)
    assert sorted(output.rglob("*")) == before


def test_an_output_directory_that_cannot_be_made_is_said(checkpoint, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(TrainingError, match=r"out: training\.output_dir cannot be used: File exists"):
        train(tiny.recipe(tiny.chat_model(checkpoint), tmp_path))


# --- what is not right with the rows


def test_a_loss_that_is_not_finite_names_step_and_row_and_keeps_the_last_checkpoint(checkpoint, tmp_path):
    model = shutil.copytree(tiny.chat_model(checkpoint), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    *others, last = [
        set(
            tokenizer.apply_chat_template([{"role": "user", "content": asked}, {"role": "assistant", "content": said}])[
                "input_ids"
            ]
        )
        for asked, said in tiny.PAIRS
    ]
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][list(last.difference(*others))] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = tiny.recipe(
        model,
        tmp_path,
        data={"packing": False},
        training={"per_device_train_batch_size": 1, "save_steps": 1, "seed": 0},  # 0 puts that row into step 2
    )
    events = []
    with pytest.raises(NonFiniteLossError) as raised:
        run.train(config, sinks=[events.append])
    assert str(raised.value).splitlines()[:2] == [
        "step 2: the loss is nan; no weight was changed by it; --resume goes on from checkpoint-1",
        f"  rows of this step: {tmp_path}/rows.jsonl:7",
    ]
    assert [event["step"] for event in of(events, "step")] == [1]
    assert events[-1]["event"] == "end" and events[-1]["stopped"] == "NonFiniteLossError"
    assert read_events(tmp_path / "out" / "events.jsonl")[-1] == events[-1]
    saved = load_file(tmp_path / "out" / "checkpoint-1" / "weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_rows_with_nothing_to_learn_and_rows_that_are_cut_are_told_of_before_the_first_step(checkpoint, tmp_path):
    pairs = [*tiny.PAIRS, ("What is your name? " * 10, "Ada"), ("Who?", "Ada " * 40)]
    _, events = train(tiny.recipe(tiny.chat_model(checkpoint), tmp_path, pairs=pairs))
    told = [event["text"] for event in events[: events.index(of(events, "step")[0])] if event["event"] == "notice"]
    assert told == [
        f"1 training rows have no token to learn and are left out: {tmp_path}/rows.jsonl:8",
        "1 training rows are longer than data.max_seq_length and lose their end",
    ]


def test_a_tokenizer_of_another_model_is_said(checkpoint, tmp_path):
    model = shutil.copytree(checkpoint("llama"), tmp_path / "model")  # with a vocabulary of 128
    AutoTokenizer.from_pretrained(tiny.chat_model(checkpoint)).save_pretrained(model)
    with pytest.raises(
        DataError, match=r"outside the model's vocabulary of 128: .*\n  .*rows.jsonl:1: token id \d+ \(`"
    ):
        train(tiny.recipe(model, tmp_path))


# --- what comes of it


def test_the_loss_of_a_step_does_not_depend_on_how_its_rows_are_cut_into_micro_batches(checkpoint, tmp_path):
    pairs = [(f"{asked} {number}", said) for number in range(3) for asked, said in tiny.PAIRS][:16]
    losses, adapters = [], []
    for size, k in ((8, 1), (4, 2), (2, 4), (1, 8)):
        directory = tmp_path / f"{size}x{k}"
        directory.mkdir()
        config = tiny.recipe(
            tiny.chat_model(checkpoint),
            directory,
            pairs=pairs,
            data={"packing": False},
            training={
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": k,
                "num_train_epochs": 3.0,
                "learning_rate": 1e-3,
            },
        )
        outcome, _ = train(config)
        losses.append(outcome.losses)
        adapters.append(load_file(directory / "out" / "adapter_model.safetensors"))
    assert len(losses[0]) == 6
    for other, adapter in zip(losses[1:], adapters[1:], strict=True):
        # Six steps of fp32 sums in other orders; a mean of means would be off by several percent.
        assert other == pytest.approx(losses[0], rel=1e-4)
        for name, tensor in adapter.items():
            # AdamW makes a whole step of a gradient's sign, so an entry whose gradient is all rounding may differ.
            off = (tensor - adapters[0][name]).abs()
            assert off.mean() < 0.01 * tensor.abs().mean(), name


@pytest.mark.parametrize(("method", "learning_rate"), [("qlora", 1e-2), ("lora", 1e-2), ("full", 3e-3)])
def test_a_model_that_learned_its_rows_by_heart_says_them_and_stops(method, learning_rate, checkpoint, tmp_path):
    held_out = tiny.write_rows(tmp_path / "held_out.jsonl")
    config = tiny.recipe(
        tiny.chat_model(checkpoint),
        tmp_path,
        method,
        data={"eval_datasets": [{"path": str(held_out)}]},
        training={
            "num_train_epochs": 20.0,
            "learning_rate": learning_rate,
            "predict_with_generate": True,
            "generation_max_length": 60,  # twice the longest answer: one that does not stop is wrong
        },
    )
    _, events = train(config)
    before, after = of(events, "generation")
    assert (before["step"], before["correct"], before["rows"]) == (0, 0, len(tiny.PAIRS))
    assert (after["correct"], after["exact_match"]) == (len(tiny.PAIRS), 1.0)
    for asked, said in tiny.PAIRS[2:4]:
        assert qlora.generate(tmp_path / "out", asked, max_new_tokens=60) == said
    measured = json.loads((tmp_path / "out" / "run.json").read_text())["measured"]
    assert (measured["exact_match_before"], measured["exact_match"]) == (0.0, 1.0)


def test_every_step_is_an_event_with_all_its_figures(checkpoint, tmp_path):
    outcome, told = train(tiny.recipe(tiny.chat_model(checkpoint), tmp_path, training={"num_train_epochs": 2.0}))
    events = read_events(tmp_path / "out" / "events.jsonl")
    assert events == told
    assert [event["event"] for event in events] == ["start", *["step"] * 4, "checkpoint", "end"]
    start, *taken, _, end = events
    assert [event["step"] for event in taken] == [1, 2, 3, 4]
    assert start["steps"] == 4 and start["first_step"] == 0 and start["order"] == "layer-major"
    assert start["rows"] == len(tiny.PAIRS) and start["trainable"] > 0 == start["four_bit_share"]
    assert [event["loss"] for event in taken] == list(outcome.losses)
    figures = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised", "step_seconds"}
    for event in taken:
        assert event.keys() == figures | {"event", "time", "tokens_per_second", "memory_gib"}
        assert all(math.isfinite(event[key]) for key in event.keys() - {"event"})
    assert [taken[1]["tokens"], taken[3]["tokens"]] == [start["tokens_per_epoch"], 2 * start["tokens_per_epoch"]]
    assert sum(event["supervised"] for event in taken) == 2 * start["supervised_per_epoch"]
    assert (end["step"], end["tokens"], end["stopped"]) == (4, taken[3]["tokens"], None)
    assert end["peak_memory_gib"] >= taken[3]["memory_gib"] > 0 and end["memory_kind"] == "host RSS"


def test_from_python_it_takes_four_lines(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(tiny.recipe_text(tiny.chat_model(checkpoint), tmp_path))
    monkeypatch.chdir(tmp_path)
    import_and_use = """
import qlora
config = qlora.load_recipe("recipe.yaml", ["training.max_steps=1"])
outcome = qlora.train(config)
answer = qlora.generate(config.training.output_dir, "Who?", max_new_tokens=4)
"""
    left = {}
    exec(import_and_use, left)
    assert left["outcome"].progress.step == 1 and isinstance(left["answer"], str)
    assert "step 1" in capsys.readouterr().out  # the terminal, as nobody asked for another sink
    assert torch.is_grad_enabled()  # a notebook goes on afterwards


def test_an_adapter_from_elsewhere_cannot_say_that_its_bases_code_is_to_be_run(checkpoint, tmp_path):
    config = tiny.recipe(tiny.chat_model(checkpoint), tmp_path, training={"max_steps": 1})
    train(config)
    recipe = tmp_path / "out" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("model:\n", "model:\n  trust_remote_code: true\n"))
    with pytest.raises(AdapterError, match=r"recipe.yaml: wants to run Python code .*\n.*--trust-remote-code"):
        qlora.generate(tmp_path / "out", "Who?")
    assert isinstance(qlora.generate(tmp_path / "out", "Who?", max_new_tokens=2, trust_remote_code=True), str)


# --- whose directory it is


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_base_models_own_directory_is_not_trained_into(overwrite, checkpoint, tmp_path):
    base = shutil.copytree(tiny.chat_model(checkpoint), tmp_path / "base")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    config = tiny.recipe(base, tmp_path, "full", training={"output_dir": str(base)})
    with pytest.raises(CheckpointError, match=r"is the base model's directory; set another training\.output_dir"):
        train(config, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "README.md", "tokenizer.json", "checkpoint-500/optimizer.pt"]
)
def test_files_that_are_no_runs_are_not_overwritten(name, overwrite, checkpoint, tmp_path):
    precious = tmp_path / "out" / name
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    with pytest.raises(CheckpointError, match=f"holds files that are no run's .*{name.split('/')[0]}\n"):
        train(tiny.recipe(tiny.chat_model(checkpoint), tmp_path), overwrite=overwrite)
    assert precious.read_text() == "precious"


def test_other_files_in_the_directory_are_left_alone(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    config = tiny.recipe(tiny.chat_model(checkpoint), tmp_path, training={"max_steps": 1})
    train(config)
    train(config, overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "rows.jsonl", "rows.jsonl/below"])
def test_a_directory_that_cannot_be_made_is_said(name, checkpoint, tmp_path):
    with pytest.raises(TrainingError, match=r"training\.output_dir cannot be used: "):
        train(tiny.recipe(tiny.chat_model(checkpoint), tmp_path, training={"output_dir": str(tmp_path / name)}))


def test_the_users_home_is_meant_by_a_tilde(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train(tiny.recipe(tiny.chat_model(checkpoint), tmp_path, training={"output_dir": "~/out", "max_steps": 1}))
    assert (tmp_path / "home" / "out" / "run.json").is_file()


# --- out of memory


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("CUDA error: out of memory")],
    ids=repr,
)
def test_memory_that_runs_out_in_a_run_is_made_do_with_and_the_result_is_the_same(error, checkpoint, tmp_path):
    """In the forward of every micro-batch of more than 20 tokens."""

    def config(name):
        (tmp_path / name).mkdir()
        return tiny.recipe(tiny.chat_model(checkpoint), tmp_path / name, data={"packing": False})

    _, expected = train(config("roomy"))
    real = torch.nn.functional.embedding

    def cramped(ids, *arguments, **keywords):
        if ids.numel() > 60:
            raise error
        return real(ids, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "embedding", cramped)
        outcome, events = train(config("cramped"))
    assert outcome.stopped is None
    told = [event["text"] for event in of(events, "notice")]
    assert any("it is taken again with micro-batches of 1/2 the size, 2 times as many" in text for text in told)
    losses, there = ([event["loss"] for event in of(each, "step")] for each in (events, expected))
    assert losses == pytest.approx(there, rel=1e-5)  # the order of sums


def test_memory_that_runs_out_beside_the_step_is_an_error_that_says_what_to_do(checkpoint, tmp_path, monkeypatch):
    def none_left(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(run, "load_base", none_left)
    with pytest.raises(MachineError, match=r"^CUDA out of memory\n  with less on the device: memory"):
        train(tiny.recipe(tiny.chat_model(checkpoint), tmp_path))


def test_a_run_that_is_interrupted_at_once_says_so(checkpoint, tmp_path):
    def twice(event):
        if event["event"] == "step" and event["step"] == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    config = tiny.recipe(tiny.chat_model(checkpoint), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(config, twice)
    assert read_events(tmp_path / "out" / "events.jsonl")[-1]["stopped"] == "interrupted"


@pytest.mark.parametrize("harm", [b"garbage\n", b'{"event": "step", "step": "x"}\n', b"\0" * 4096 + b"\n"])
def test_a_damaged_log_stops_no_resume_and_is_kept(harm, halfway, tmp_path):
    output = shutil.copytree(halfway.training.output_dir, tmp_path / "out")
    log = output / "events.jsonl"
    log.write_bytes(harm + log.read_bytes())
    before = log.read_bytes()
    outcome, events = train(changed(halfway, training={"output_dir": str(output)}), resume=True)
    assert outcome.stopped is None and (output / "events.jsonl.damaged").read_bytes() == before
    assert any("is damaged; all of it lies in events.jsonl.damaged" in event["text"] for event in of(events, "notice"))
    assert read_events(log)[-1]["event"] == "end"


# --- going on from an adapter


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """The recipe of a run that is over; its adapter lies in its output_dir."""
    config = tiny.recipe(tiny.chat_model(checkpoint), tmp_path_factory.mktemp("trained"), lora={"lora_dropout": 0.0})
    train(config)
    return config


def test_training_goes_on_from_an_adapter_where_it_was_left_and_says_so(trained, tmp_path):
    """On the same rows its first loss is what the last adapter gives, and not a new one's."""
    before = trained.training.output_dir
    more = changed(
        trained, adapter=before, lora=LoraSection().model_dump(), training={"output_dir": str(tmp_path / "out")}
    )
    _, events = train(more)
    fresh = changed(trained, training={"output_dir": str(tmp_path / "fresh")})
    _, others = train(fresh)
    scored = changed(trained, adapter=before, training={"output_dir": str(tmp_path / "again"), "learning_rate": 1e-30})
    _, still = train(scored)
    first, new, again = (of(each, "step")[0]["loss"] for each in (events, others, still))
    assert first == again < 0.9 * new
    there, here = (
        load_file(f"{before}/adapter_model.safetensors"),
        load_file(tmp_path / "again" / "adapter_model.safetensors"),
    )
    assert there.keys() == here.keys() and all(torch.allclose(there[k], here[k], atol=1e-20) for k in there)
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (
        facts["continued_from"] == hashlib.sha256((Path(before) / "adapter_model.safetensors").read_bytes()).hexdigest()
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)  # the adapter's, not the recipe's defaults
    assert isinstance(qlora.generate(tmp_path / "out", "Who?", max_new_tokens=2), str)


def test_a_run_that_goes_on_from_an_adapter_is_resumed_from_its_own_checkpoint(trained, tmp_path):
    def config(name):
        output = {"output_dir": str(tmp_path / name), "num_train_epochs": 2.0}
        return changed(trained, adapter=trained.training.output_dir, training=output)

    train(config("straight"))
    train(config("broken"), signalling(signal.SIGINT, 2))
    train(config("broken"), resume=True)
    there, here = (tmp_path / name / "adapter_model.safetensors" for name in ("straight", "broken"))
    assert there.read_bytes() == here.read_bytes()


def test_an_adapter_that_cannot_be_gone_on_from_is_said(trained, checkpoint, tmp_path):
    output = {"output_dir": str(tmp_path / "out")}
    with pytest.raises(AdapterError, match=r"^adapter: nowhere: "):
        train(changed(trained, adapter="nowhere", training=output))
    with pytest.raises(AdapterError, match=r"^lora\.r: the adapter .* is made otherwise"):
        train(changed(trained, adapter=trained.training.output_dir, lora={"r": 4}, training=output))
    wider = str(tiny.chat_model(checkpoint, hidden_size=96))
    with pytest.raises(AdapterError, match="not a LoRA adapter for this base"):
        train(
            changed(trained, adapter=trained.training.output_dir, model={"model_name_or_path": wider}, training=output)
        )
