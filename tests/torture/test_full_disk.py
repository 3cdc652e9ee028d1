"""A disk of 16 MB: a run that cannot fit is refused before its first step; one that fills it later loses nothing."""

import os
import shutil
import subprocess

import pytest

from qlora import durable
from qlora.errors import MachineError, QLoRAError
from qlora.recipe import parse_recipe
from qlora.run import train
from qlora.train.checkpoint import checkpoints, newest
from tests.tiny import chat_model, recipe_text
from tests.torture.attempts import told

MIB = 1 << 20
DISK = 16 * MIB


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A directory on a file system of 16 MB: a real one where this process may mount it, else a quota on its files."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = False
    if os.name == "posix" and os.geteuid() == 0 and shutil.which("mount"):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(directory)]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    if not mounted:
        _quota(directory, monkeypatch)
    yield directory
    if mounted:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def _quota(directory, monkeypatch):
    """The same for writes that go through Python, which ours do."""
    write, usage = os.write, shutil.disk_usage

    def free():
        return DISK - sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())

    def limited(descriptor, content):
        if str(directory) in os.readlink(f"/proc/self/fd/{descriptor}") and len(content) > free():
            raise OSError(28, os.strerror(28))
        return write(descriptor, content)

    def limited_usage(path):
        return usage(path)._replace(free=free()) if str(path).startswith(str(directory)) else usage(path)

    monkeypatch.setattr(os, "write", limited)
    monkeypatch.setattr(shutil, "disk_usage", limited_usage)


def fill(directory, leave):
    """Take all room but `leave` bytes."""
    with (directory / "filler").open("wb") as f:
        while (more := durable.free_disk_bytes(directory) - leave) > 0:
            f.write(bytes(min(more, 4096 if more < MIB else MIB)))
            f.flush()


@pytest.fixture(scope="module")
def wide(checkpoint):
    """A model whose adapter's checkpoint has about 2 MB."""
    return chat_model(checkpoint, intermediate_size=1024)


def config(model, disk, directory, **training):
    directory.mkdir(exist_ok=True)
    knobs = {"output_dir": str(disk / "out"), "max_steps": 6, "save_steps": 2, "save_total_limit": 1}
    return parse_recipe(recipe_text(model, directory, lora={"r": 32}, training=knobs | training))


def test_a_run_that_cannot_fit_is_refused_before_its_first_step(wide, small_disk, tmp_path):
    events = []
    with pytest.raises(MachineError) as raised:
        train(
            config(wide, small_disk, tmp_path, save_steps=1, save_total_limit=None, max_steps=60), sinks=[events.append]
        )
    said = str(raised.value)
    assert "it needs " in said and "MiB are free\n  checkpoints 60 x " in said and "save_total_limit: 1" in said
    assert not [event for event in events if event["event"] == "step"]
    outcome = train(config(wide, small_disk, tmp_path), sinks=[])
    assert outcome.progress.step == 6


@pytest.mark.parametrize("leave", [0, 20_000, 200_000, 700_000, 1_500_000])
def test_a_disk_that_another_fills_stops_the_run_with_the_last_checkpoint_whole(leave, wide, small_disk, tmp_path):
    expected = tmp_path / "other"
    train(config(wide, expected, tmp_path), sinks=[])

    def another(event):
        if event["event"] == "step" and event["step"] == 3:
            fill(small_disk, leave)

    small = config(wide, small_disk, tmp_path)
    with pytest.raises(QLoRAError) as raised:
        train(small, sinks=[another])
    assert "No space left on device" in str(raised.value)
    if isinstance(raised.value, MachineError):
        assert "(needs " in str(raised.value) and " are free)\n" in str(raised.value)
    output = small_disk / "out"
    assert newest(output, print).path.name == "checkpoint-2"
    assert not list(output.glob(durable.UNFINISHED))
    (small_disk / "filler").unlink()
    train(small, resume=True, sinks=[])
    assert told(output, "loss") == told(expected / "out", "loss")
    assert [path.name for path in checkpoints(output)] == ["checkpoint-6"]


@pytest.mark.parametrize("leave", [0, 20_000, 200_000, 700_000])
def test_an_export_that_finds_the_disk_full_leaves_nothing_half_written(leave, wide, small_disk, tmp_path):
    def another(event):
        if event["event"] == "checkpoint" and event["step"] == 6:
            fill(small_disk, leave)

    small, output = config(wide, small_disk, tmp_path), small_disk / "out"
    with pytest.raises(QLoRAError, match="No space left on device"):
        train(small, sinks=[another])
    assert newest(output, print).path.name == "checkpoint-6"
    assert not list(output.glob("adapter*")) and not list(output.glob(durable.UNFINISHED))
    (small_disk / "filler").unlink()
    assert train(small, resume=True, sinks=[]).losses == ()
    assert (output / "adapter_model.safetensors").is_file() and (output / "run.json").is_file()
