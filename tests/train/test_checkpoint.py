"""Checkpoints: whole or not there, and only for the run that they are of. Bit for bit: see tests/test_run.py.

Killed and full disks: see tests/torture.
"""

import hashlib
import json
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from qlora import durable
from qlora.config import TrainingConfig
from qlora.errors import CheckpointError, MachineError
from qlora.train import checkpoint, optim
from qlora.train.checkpoint import Progress, Run, check_room, checkpoints, newest, save
from qlora.train.loop import Loop

IDENTITY = {"method": "qlora", "model": {"path": "base", "commit": None}, "lora": {"r": 8, "targets": ("q", "v")}}


def made(fill=0.0, name="adamw_torch", width=4):
    """Weights and an optimizer that has taken a step with them."""
    weights = {"a": nn.Parameter(torch.full((width, width), fill)), "b": nn.Parameter(torch.full((4,), fill))}
    optimizer, _ = optim.build(TrainingConfig(optim=name), weights, 10, lambda text: None)
    for parameter in weights.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return weights, optimizer


def saved(directory, step=3, keep=None, fill=0.0, **settings):
    return save(directory, Progress(step, 100 * step, 1.5 * step), *made(fill), Run(IDENTITY, settings), keep)


def load(directory, weights, optimizer, identity=IDENTITY, **settings):
    """From the newest that is whole: how far it is, and what is set otherwise."""
    found = newest(directory, print)
    changed = checkpoint.compare(found, Run(identity, settings))
    return checkpoint.load(found, weights, optimizer), changed


def test_what_was_saved_is_loaded(tmp_path):
    weights, optimizer = made(1.0)
    save(tmp_path, Progress(3, 100, 1.5), weights, optimizer, Run(IDENTITY, {}), None)
    others, other_optimizer = made(2.0)
    assert load(tmp_path, others, other_optimizer) == (Progress(3, 100, 1.5), [])
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    theirs, ours = (optim.state_tensors(o, w) for o, w in ((optimizer, weights), (other_optimizer, others)))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_the_newest_are_kept_by_their_number(tmp_path):
    for step in (8, 9, 10, 11):
        saved(tmp_path, step, keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]


def test_what_a_save_that_died_had_yet_to_remove_goes_when_the_run_goes_on(tmp_path):
    for step in (9, 10, 11):
        saved(tmp_path, step)
    training = TrainingConfig(output_dir=str(tmp_path), optim="adamw_torch", max_steps=11, save_total_limit=2)
    step = SimpleNamespace(device=torch.device("cpu"))
    loop = Loop(step, made()[0], lambda _: [1], training, Run(IDENTITY), lambda *_, **__: None)
    loop.resume(newest(tmp_path, print))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]


def test_generators_go_on_where_they_were(tmp_path):
    saved(tmp_path)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.random(), np.random.rand(), torch.rand(1)
    load(tmp_path, *made())
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


@pytest.mark.parametrize("file", [checkpoint.STATE, checkpoint.WEIGHTS, checkpoint.OPTIMIZER, durable.MANIFEST])
@pytest.mark.parametrize("harm", ["truncated", "empty", "missing", "of another kind", "one byte longer", "a link"])
def test_one_that_is_damaged_is_named_and_the_one_before_it_is_used(file, harm, tmp_path):
    saved(tmp_path, 3, fill=1.0)
    path = saved(tmp_path, 4) / file
    whole = path.read_bytes()
    match harm:
        case "missing":
            path.unlink()
        case "a link":
            path.rename(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
        case _:
            harmed = {"truncated": whole[: len(whole) // 2], "empty": b"", "one byte longer": whole + b"}"}
            path.write_bytes(harmed.get(harm, json.dumps({"progress": {"step": 3}}).encode()))
    said = []
    assert newest(tmp_path, said.append).path.name == "checkpoint-3"
    assert len(said) == 1 and said[0].startswith("checkpoint-4: ") and file in said[0] and "passed over" in said[0]


@pytest.mark.torture
def test_any_flipped_bit_is_found_and_the_one_before_it_is_used(tmp_path, times):
    saved(tmp_path, 3, fill=1.0)
    last, drawn = saved(tmp_path, 4), random.Random(0)
    for path in sorted(last.iterdir()):
        whole = path.read_bytes()
        places = drawn.sample(range(len(whole)), min(len(whole), times(30, 3000)))
        for place in {0, len(whole) - 1, *places}:
            bit = drawn.randrange(8)
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            found = newest(tmp_path, lambda text: None)
            assert found.path.name == "checkpoint-3", f"{path.name}, byte {place}, bit {bit}"
        path.write_bytes(whole)
    assert newest(tmp_path, print).path == last


def test_where_none_is_whole_each_is_named(tmp_path):
    for step in (3, 4):
        (saved(tmp_path, step) / checkpoint.WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint there can be.*\n  checkpoint-4: .*\n  checkpoint-3: "):
        newest(tmp_path, print)


def test_a_checkpoint_of_pickles_is_never_opened_and_said_to_be_one(tmp_path):
    """What transformers' Trainer writes bears the same name."""
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(CheckpointError, match=r"checkpoint-500: has no manifest.json \(optimizer.pt is a pickle"):
        newest(tmp_path, print)


def test_older_ones_are_removed_only_when_the_new_one_was_read_back(tmp_path, monkeypatch):
    before = saved(tmp_path, 3)

    def fails(path):
        raise durable.Damaged("weights.safetensors is not what was written")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "verify", fails)
        with pytest.raises(MachineError, match="is the disk failing"):
            saved(tmp_path, 4, keep=1)
    assert before in checkpoints(tmp_path)


def test_a_newer_one_of_an_attempt_that_was_passed_over_is_replaced_when_its_step_comes(tmp_path):
    saved(tmp_path, 3)
    (saved(tmp_path, 5) / checkpoint.WEIGHTS).write_bytes(b"")
    assert newest(tmp_path, print).path.name == "checkpoint-3"
    saved(tmp_path, 4, keep=1)
    assert newest(tmp_path, print).path.name == "checkpoint-4"
    saved(tmp_path, 5, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-5"]
    assert newest(tmp_path, print).path.name == "checkpoint-5"


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_the_bytes_of_a_checkpoint_are_known_before_there_is_one(name, tmp_path):
    training = TrainingConfig(optim=name)
    weights, optimizer = made(1.0, name, width=3000)
    path = save(tmp_path, Progress(1), weights, optimizer, Run(IDENTITY, {}), None)
    written = sum(file.stat().st_size for file in path.iterdir())
    assert written <= checkpoint.nbytes(training, weights) <= written + 2**20


@pytest.mark.parametrize(
    ("keep", "saves", "there", "expected"), [(2, 9, 0, 3), (2, 2, 0, 2), (2, 9, 2, 1), (None, 9, 1, 9)]
)
def test_a_disk_that_cannot_hold_the_checkpoints_is_found_before_the_first_step(
    keep, saves, there, expected, tmp_path, monkeypatch
):
    for step in range(1, there + 1):
        saved(tmp_path, step)
    training, (weights, _) = TrainingConfig(optim="adamw_torch", save_total_limit=keep), made()
    needed = expected * checkpoint.nbytes(training, weights) + 5000
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if free == needed:
            check_room(tmp_path, training, weights, saves, beside=5000)
        else:
            with pytest.raises(
                MachineError, match=rf"needs .* are free\n  checkpoints {expected} x .*\n.*save_total_limit"
            ):
                check_room(tmp_path, training, weights, saves, beside=5000)


def test_a_checkpoint_of_another_run_is_refused_with_each_key_that_differs(tmp_path):
    path = saved(tmp_path)
    ours = IDENTITY | {"method": "lora", "lora": {"r": 16, "targets": ["q", "v"]}, "model": {"path": "base"}}
    weights, optimizer = made(2.0)
    before = weights["a"].detach().clone()
    with pytest.raises(CheckpointError) as raised:
        load(tmp_path, weights, optimizer, ours)
    assert str(raised.value).splitlines() == [
        f"{path}: belongs to another run",
        "  lora.r: `8` there, `16` here",
        "  method: `qlora` there, `lora` here",
    ]
    assert torch.equal(weights["a"], before)


def test_of_long_texts_that_differ_the_place_where_they_part_is_shown(tmp_path):
    template = "{% for turn in messages %}" * 9
    save(tmp_path, Progress(3), *made(), Run({"chat_template": template + "{{ a }}"}, {}), None)
    with pytest.raises(CheckpointError) as raised:
        load(tmp_path, *made(), {"chat_template": template + "{{ b }}"})
    assert str(raised.value).splitlines()[1:] == ["  chat_template: `…ages %}{{ a }}` there, `…ages %}{{ b }}` here"]


def test_what_may_be_set_otherwise_is_said(tmp_path):
    saved(tmp_path, training={"learning_rate": 1e-4, "max_steps": 8}, device="CPU")
    _, changed = load(tmp_path, *made(), training={"learning_rate": 2e-4, "max_steps": 8}, device="a GPU")
    assert changed == ["device: `CPU` there, `a GPU` here", "training.learning_rate: `0.0001` there, `0.0002` here"]


def test_a_checkpoint_with_other_weights_is_refused(tmp_path):
    saved(tmp_path)
    weights, optimizer = made()
    with pytest.raises(CheckpointError, match="holds other weights"):
        load(tmp_path, weights | {"c": nn.Parameter(torch.ones(1))}, optimizer)


def rewritten(directory, name, change):
    """Somebody changes a file of the newest checkpoint, and its manifest too."""
    path = checkpoints(directory)[-1]
    content = change((path / name).read_bytes())
    (path / name).write_bytes(content)
    manifest = json.loads((path / durable.MANIFEST).read_bytes())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / durable.MANIFEST).write_text(json.dumps(manifest))


HOSTILE = {
    **{f"step {value!r}": (("progress", "step"), value) for value in (10**18, -1, 0, 4, "3", 3.5, [], True, None)},
    **{f"tokens {value!r}": (("progress", "tokens"), value) for value in (-1, "x", 1.5)},
    **{f"seconds {value!r}": (("progress", "seconds"), value) for value in (-1e300, None, "x")},
    **{f"today {value!r}": (("identity", "today"), value) for value in (5, "gestern", [])},
    "identity []": (("identity",), []),
    "settings None": (("settings",), None),
    "another key": (("more",), 1),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_state_that_no_run_can_be_in_is_damage_though_its_manifest_says_otherwise(case, tmp_path):
    saved(tmp_path, 3)
    keys, value = HOSTILE[case]

    def change(content):
        state = place = json.loads(content)
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        return json.dumps(state).encode()

    rewritten(tmp_path, checkpoint.STATE, change)
    with pytest.raises(CheckpointError, match=r"checkpoint-3: state.json is damaged"):
        newest(tmp_path, print)


def test_infinite_seconds_are_damage_too(tmp_path):
    saved(tmp_path, 3)
    rewritten(tmp_path, checkpoint.STATE, lambda content: re.sub(rb'"seconds": [0-9.]+', b'"seconds": NaN', content))
    with pytest.raises(CheckpointError, match=r"checkpoint-3: state.json is damaged"):
        newest(tmp_path, print)


GENERATORS = {
    "python": ([3, [10**30] * 625, None], [3, [0] * 5, None], "x", None),
    "numpy": (
        ["MT19937", [0] * 624, 10**9, 0, 0.0],  # NumPy would read there
        ["MT19937", [0] * 624, -5, 0, 0.0],
        ["MT19937", [0] * 10, 1, 0, 0.0],
        ["MT19937", [-1] * 624, 1, 0, 0.0],
        ["PCG64", [0] * 624, 1, 0, 0.0],
    ),
    "torch": ("00", "zz", "", 5),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GENERATORS.items() for value in values])
def test_a_state_that_no_generator_can_be_in_is_refused(name, value, tmp_path):
    saved(tmp_path, 3)

    def change(content):
        state = json.loads(content)
        state["generators"][name] = value
        return json.dumps(state).encode()

    rewritten(tmp_path, checkpoint.STATE, change)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-3: its optimizer or generators are not this run's"):
            load(tmp_path, *made())
    finally:
        random.setstate(before[0]), np.random.set_state(before[1]), torch.set_rng_state(before[2])


@pytest.mark.parametrize("optim_name", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("harm", ["other shapes", "other types", "one is missing", "one too many", "none"])
@pytest.mark.parametrize("file", [checkpoint.WEIGHTS, checkpoint.OPTIMIZER])
def test_tensors_that_are_not_this_runs_are_refused_before_they_are_used(file, harm, optim_name, tmp_path):
    """A state of one element would be read past its end by a fused optimizer."""
    save(tmp_path, Progress(3), *made(1.0, optim_name, 96), Run(IDENTITY, {}), None)

    def change(content):
        tensors = safetensors.torch.load(content)
        first = next(name for name in sorted(tensors) if tensors[name].numel() > 1)
        match harm:
            case "other shapes":
                tensors[first] = tensors[first].flatten()[:1].clone()
            case "other types":
                tensors[first] = tensors[first].to(torch.float64)
            case "one is missing":
                del tensors[first]
            case "one too many":
                tensors["x//exp_avg"] = torch.zeros(3)
            case "none":
                tensors = {}
        return safetensors.torch.save(tensors)

    rewritten(tmp_path, file, change)
    with pytest.raises(CheckpointError, match=r"holds other weights|its optimizer or generators are not"):
        load(tmp_path, *made(2.0, optim_name, 96))


def test_a_parameter_that_never_had_a_gradient_has_no_state_and_is_resumed_so(tmp_path):
    weights, optimizer = made(1.0)
    optimizer.state.pop(weights["b"])
    save(tmp_path, Progress(3), weights, optimizer, Run(IDENTITY, {}), None)
    others, other = made(2.0)
    other.state.clear()
    other.zero_grad()
    load(tmp_path, others, other)
    assert not other.state[others["b"]] and torch.equal(
        other.state[others["a"]]["exp_avg"], optimizer.state[weights["a"]]["exp_avg"]
    )


@pytest.mark.parametrize(
    "name", ["checkpoint-0004", "checkpoint-\u0664", "checkpoint-" + "9" * 200, "checkpoint-4x", "checkpoint-0"]
)
def test_what_only_looks_like_a_checkpoint_is_none(name, tmp_path):
    before = saved(tmp_path, 3)
    shutil.copytree(before, tmp_path / name)
    assert checkpoints(tmp_path) == [before]


def test_a_link_is_no_checkpoint_and_what_stands_in_the_place_of_one_makes_room_for_it(tmp_path):
    elsewhere = saved(tmp_path / "elsewhere", 4)
    (tmp_path / "checkpoint-4").symlink_to(elsewhere)
    (tmp_path / "checkpoint-5").symlink_to(tmp_path / "nowhere")
    (tmp_path / "checkpoint-6").write_text("a file")
    assert checkpoints(tmp_path) == []
    for step in (4, 5, 6):
        saved(tmp_path, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]
    assert elsewhere.is_dir() and not list(tmp_path.glob(durable.UNFINISHED))
