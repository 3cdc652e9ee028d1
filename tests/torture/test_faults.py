"""Whatever fails while something is saved, and wherever the process dies in it, what can be loaded is there."""

import json
import os
from contextlib import suppress

import pytest
import torch
from torch import nn

from qlora import durable
from qlora.config import TrainingConfig
from qlora.errors import MachineError
from qlora.export import adapter as export
from qlora.model.adapters import attach
from qlora.train import optim
from qlora.train.checkpoint import Progress, Run, newest, save
from tests.disk_faults import Calls, ctrl_c, die, full, in_a_child
from tests.tiny import chat_model, recipe

RUN = Run({"method": "lora"}, {})


@pytest.fixture(scope="module")
def trained():
    """Weights and an optimizer that has taken a step."""
    weights = {"a": nn.Parameter(torch.rand(64, 64)), "b": nn.Parameter(torch.rand(4))}
    optimizer, _ = optim.build(TrainingConfig(optim="adamw_torch"), weights, 10, print)
    optim.settle(optimizer, weights.values())
    return weights, optimizer


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that is there, damaged"])
@pytest.mark.parametrize("fault", [full, ctrl_c, die], ids=lambda fault: fault.__name__)
def test_a_fault_at_any_call_of_a_save_leaves_a_checkpoint_that_can_be_loaded(fault, again, trained, tmp_path):
    def saved(directory, step):
        return save(directory, Progress(step), *trained, RUN, keep=1 if step > 3 else None)

    def prepared(name):
        saved(tmp_path / name, 3)
        if again:
            damaged = saved(tmp_path / name, 5)
            (damaged / "weights.safetensors").write_bytes(b"")
            saved(tmp_path / name, 3)
        return tmp_path / name

    with Calls().heard() as counted:
        saved(prepared("whole"), 5)
    with Calls().heard() as counted_before:
        prepared("counted")
    of_the_save = counted.names[len(counted_before.names) :]
    assert {"mkdir", "open", "write", "fsync", "rename"} <= {*of_the_save}
    for at in range(len(of_the_save)):
        directory = prepared(f"fault{at}")

        def attempt(directory=directory, at=at):
            with Calls(at, fault).heard():
                saved(directory, 5)

        if fault is die:
            assert in_a_child(attempt) in (0, 9)
        else:
            with suppress(MachineError, KeyboardInterrupt):
                attempt()  # what removes leftovers may fail: they are removed the next time
        assert newest(directory, lambda text: None).path.name in ("checkpoint-3", "checkpoint-5")
        saved(directory, 6)
        assert newest(directory, print).path.name == "checkpoint-6"


def test_all_bytes_are_on_the_disk_before_the_name_that_is_believed(trained, tmp_path):
    """Power may fail at any moment: a rename may reach the disk before what was only written."""
    order, descriptors = [], {}
    real = os.open, os.fsync, os.rename

    def opened(path, *arguments, **keywords):
        descriptor = real[0](path, *arguments, **keywords)
        descriptors[descriptor] = os.path.basename(path)
        return descriptor

    def flushed(descriptor):
        order.append(descriptors[descriptor])
        real[1](descriptor)

    def renamed(source, target):
        order.append(f"-> {os.path.basename(target)}")
        real[2](source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opened)
        patch.setattr(os, "fsync", flushed)
        patch.setattr(os, "rename", renamed)
        save(tmp_path, Progress(1), *trained, RUN, None)
    unfinished = f".checkpoint-1.{os.getpid()}.unfinished"
    files = ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    assert order == [*files, unfinished, "-> checkpoint-1", tmp_path.name]


@pytest.mark.parametrize("fault", [full, die], ids=lambda fault: fault.__name__)
def test_a_fault_at_any_call_of_an_export_leaves_the_adapter_whole_or_known_not_to_be(fault, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = chat_model(checkpoint)
    config = recipe(path, tmp_path)
    model = attach(AutoModelForCausalLM.from_pretrained(path), config.lora, 0)
    tokenizer = AutoTokenizer.from_pretrained(path)

    def written(directory):
        export.write(directory, model, tokenizer, "method: lora\n", "base", None, {"measured": {}})

    def whole(directory):
        """As `run.json` says that it is."""
        files = json.loads((directory / export.RUN_FILE).read_text())["files"]
        there = {name: durable.FileRecord.model_validate(record) for name, record in files.items()}
        (directory / durable.MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
        try:
            return durable.verify(directory) == there and "adapter_model.safetensors" in there
        finally:
            (directory / durable.MANIFEST).unlink()

    with Calls().heard() as counted:
        written(tmp_path / "whole")
    assert whole(tmp_path / "whole")
    for at in range(0, len(counted.names)):
        directory = tmp_path / f"fault{at}"
        written(directory)

        def attempt(directory=directory, at=at):
            with Calls(at, fault).heard():
                written(directory)

        if fault is die:
            assert in_a_child(attempt) in (0, 9)
        else:
            with suppress(MachineError):
                attempt()
        assert not export.is_there(directory) or whole(directory)
        written(directory)
        assert whole(directory)
