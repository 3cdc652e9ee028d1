"""Checkpoints: whole or not there, and only for the run that they are of. Bit for bit: see tests/test_run.py.

Killed and full disks: see tests/torture.
"""

import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from qlora import durable
from qlora.config import TrainingConfig
from qlora.errors import CheckpointError, MachineError
from qlora.train import checkpoint, optim
from qlora.train.checkpoint import Progress, Run, check_room, checkpoints, newest, save

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
    return checkpoint.load(newest(directory, print), weights, optimizer, Run(identity, settings))


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
    for step in range(there):
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
