"""A merge that is killed at any moment, or whose disk fills up, goes on to the very bytes of one that never was."""

import json
import os
import random
import re
import signal
import time
from functools import partial

import pytest
import torch

from qlora import durable
from qlora.errors import MachineError
from qlora.export.merge import Merged
from qlora.export.writing import write
from qlora.model.adapters import attach
from qlora.model.load import load_base
from qlora.model.source import open_source
from tests.disk_faults import Calls, die, full, in_a_child

SHARD_BYTES = 60_000  # ten shards


@pytest.fixture
def merging(checkpoint, recipe, tmp_path):
    """merging(out) merges the same adapter into the same base, to `out`."""
    torch.set_num_threads(1)  # a fork has this thread alone
    config = recipe(checkpoint("llama"))
    source = open_source(config.model)
    model = attach(load_base(config, source, torch.device("cpu")).model, config.lora, seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = Merged(tmp_path / "adapter", source, config, "dequantized")

    def merge(out, say=lambda text: None):
        write(merged, out, lambda directory: (directory / "README.md").write_text("# merged\n"), SHARD_BYTES, say)

    return merge


def contents(directory):
    """Every file's SHA-256, of a directory that is whole."""
    return durable.verify(directory)


def killed_after(seconds, work):
    """Do it in a fork that is killed after so many seconds; returns whether that hit it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.torture
def test_killed_at_random_moments_the_next_merge_finishes_with_the_same_bytes(merging, tmp_path, times):
    whole, started = tmp_path / "whole", time.monotonic()
    merging(whole)
    seconds, expected = time.monotonic() - started, contents(whole)
    assert len([name for name in expected if name.endswith(".safetensors")]) > 5
    drawn, kills, kept, recovered = random.Random(7), 0, 0, 0
    while recovered < times(5, 20):
        out, said = tmp_path / f"out{kills}", []
        if drawn.random() < 0.3:
            merging(out)  # there is an earlier one to replace
        before = out.exists()
        if not killed_after(drawn.uniform(0, 1.2 * seconds), partial(merging, out)):
            continue
        kills += 1
        assert (contents(out) == expected) if out.exists() else not before or list(tmp_path.glob(".*.unfinished"))
        merging(out, said.append)
        assert contents(out) == expected
        assert not list(tmp_path.glob(durable.UNFINISHED))
        kept += any("from a merge that was cut short" in line for line in said)
        recovered += 1
    print(f"{recovered} of {kills} merges recovered; {kept} of them from whole shards")
    assert kept


@pytest.mark.torture
@pytest.mark.parametrize("fault", [full, die])
def test_a_disk_that_is_full_or_a_death_at_any_call_leaves_no_half_of_a_model(fault, merging, tmp_path, times):
    whole = tmp_path / "whole"
    with Calls().heard() as calls:
        merging(whole)
    expected, told = contents(whole), 0
    some = random.Random(8).sample(range(len(calls.names)), times(12, len(calls.names)))
    for at in sorted(some):
        out = tmp_path / f"out{at}"
        if fault is die:
            with Calls(at, die).heard():
                assert in_a_child(partial(merging, out)) in (0, 9)
        else:
            with Calls(at, full).heard():
                try:
                    merging(out)
                except MachineError as error:
                    advice = "(whole shards are kept|give --out)"  # the second where there are none yet
                    assert re.search(rf"No space left on device \(needs .*\n  {advice}", str(error))
                    told += 1
        assert not out.exists() or contents(out) == expected
        left = tmp_path / f".out{at}.merging.unfinished" / "progress.json"
        shards = json.loads(left.read_bytes())["shards"] if left.exists() else {}
        said = []
        merging(out, said.append)
        assert contents(out) == expected
        assert not list(tmp_path.glob(durable.UNFINISHED))
        # Whole shards were kept, where the model was not already in its place.
        assert bool(shards) >= any("cut short" in line for line in said)
    assert told or fault is die
