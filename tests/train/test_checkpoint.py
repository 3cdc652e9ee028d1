"""Checkpoints: whole or not there, and only for the run that they are of. Bit for bit: see tests/test_run.py."""

import json

import pytest
import torch
from torch import nn

from qlora.config import TrainingConfig
from qlora.errors import CheckpointError
from qlora.train import checkpoint, optim
from qlora.train.checkpoint import Progress, checkpoints, load, save

IDENTITY = {"method": "qlora", "model": {"path": "base", "commit": None}, "lora": {"r": 8, "targets": ("q", "v")}}


def made(fill=0.0):
    """Weights and an optimizer that has taken a step with them."""
    weights = {"a": nn.Parameter(torch.full((4, 4), fill)), "b": nn.Parameter(torch.full((4,), fill))}
    optimizer, _ = optim.build(TrainingConfig(optim="adamw_torch"), weights, 10, print)
    for parameter in weights.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return weights, optimizer


def saved(directory, step=3, keep=None, identity=IDENTITY, fill=0.0):
    return save(directory, Progress(step, 100 * step, 1.5 * step), *made(fill), identity, keep)


def test_what_was_saved_is_loaded(tmp_path):
    weights, optimizer = made(1.0)
    path = save(tmp_path, Progress(3, 100, 1.5), weights, optimizer, IDENTITY, None)
    others, other_optimizer = made(2.0)
    assert load(path, others, other_optimizer, IDENTITY) == Progress(3, 100, 1.5)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    theirs, ours = (optim.state_tensors(o, w) for o, w in ((optimizer, weights), (other_optimizer, others)))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_the_newest_are_kept_by_their_number(tmp_path):
    for step in (8, 9, 10, 11):
        saved(tmp_path, step, keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]


SAVING = {  # what a save calls, and how many of these calls are done before the one that fails
    "weights": (checkpoint, "save_file", 0),
    "optimizer": (checkpoint, "save_file", 1),
    "flush": (checkpoint, "_flush", 2),
    "rename": (checkpoint.Path, "rename", 0),
}


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
@pytest.mark.parametrize("during", SAVING)
def test_a_save_that_fails_leaves_nothing_under_the_final_name_and_the_one_before_as_it_was(
    during, error, tmp_path, monkeypatch
):
    before = saved(tmp_path, 3)
    home, name, after = SAVING[during]
    real, calls = getattr(home, name), []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise error
        return real(*arguments)

    monkeypatch.setattr(home, name, fails)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected) as raised:
        saved(tmp_path, 4)
    if expected is CheckpointError:
        assert f"{tmp_path / 'checkpoint-4'}: cannot be written: No space left on device" in str(raised.value)
    assert list(tmp_path.iterdir()) == checkpoints(tmp_path) == [before]
    assert load(before, *made(), IDENTITY).step == 3


def test_a_killed_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    """Nothing is cleaned up by a process that is killed: whatever stands under the final name must be whole."""
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(checkpoint, "_flush", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path)
    assert [path.match(checkpoint.UNFINISHED) for path in tmp_path.iterdir()] == [True]
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("file", [checkpoint.STATE, checkpoint.WEIGHTS, checkpoint.OPTIMIZER])
@pytest.mark.parametrize("harm", ["truncated", "empty", "missing", "of another kind"])
def test_a_checkpoint_that_is_not_whole_is_named_and_changes_nothing(file, harm, tmp_path):
    path = saved(tmp_path, fill=1.0)
    whole = (path / file).read_bytes()
    match harm:
        case "missing":
            (path / file).unlink()
        case "of another kind":
            (path / file).write_text(json.dumps({"progress": {"step": 3}}))
        case _:
            (path / file).write_bytes(whole[: len(whole) // 2] if harm == "truncated" else b"")
    weights, optimizer = made(2.0)
    before = {name: p.detach().clone() for name, p in weights.items()}
    with pytest.raises(CheckpointError, match="checkpoint-3: not a whole checkpoint"):
        load(path, weights, optimizer, IDENTITY)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_a_checkpoint_of_another_run_is_refused_with_each_key_that_differs(tmp_path):
    path = saved(tmp_path)
    ours = IDENTITY | {"method": "lora", "lora": {"r": 16, "targets": ["q", "v"]}, "model": {"path": "base"}}
    weights, optimizer = made(2.0)
    before = weights["a"].detach().clone()
    with pytest.raises(CheckpointError) as raised:
        load(path, weights, optimizer, ours)
    assert str(raised.value).splitlines() == [
        f"{path}: belongs to another run",
        "  lora.r: `8` there, `16` here",
        "  method: `qlora` there, `lora` here",
    ]
    assert torch.equal(weights["a"], before)


def test_a_checkpoint_with_other_weights_is_refused(tmp_path):
    path = saved(tmp_path)
    weights, optimizer = made()
    with pytest.raises(CheckpointError, match="holds other weights"):
        load(path, weights | {"c": nn.Parameter(torch.ones(1))}, optimizer, IDENTITY)
