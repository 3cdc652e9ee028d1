"""The NF4 cache: whole, fresh and what was written, or not used; and no rubbish is left on the disk."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from qlora.errors import CacheError, MachineError
from qlora.model import cache as module
from qlora.model.cache import MANIFEST, Cache, CacheBuilder, cache_home, open_cache
from qlora.model.nf4 import FourBit, quantize
from qlora.model.shards import Layout
from qlora.model.source import Source
from qlora.model.transfer import host_buffer

SETTINGS = {"quant_type": "nf4", "double_quant": True}
BF16 = torch.bfloat16


@pytest.fixture
def source(tmp_path) -> Source:
    directory = tmp_path / "a model"
    directory.mkdir()
    torch.manual_seed(0)
    for i in (1, 2):
        save_file({f"w{i}": torch.randn(64, 64)}, directory / f"model-{i}.safetensors")
    return Source("a model", directory, None, tuple(sorted(directory.glob("*.safetensors"))), None)


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "home"


def content() -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    four_bit = {f"w.{part}": t for part, t in quantize(torch.randn(128, 64), FourBit()).items()}
    return {
        "model.layers.0": four_bit,
        "model.layers.1": {"w": torch.arange(5000.0)},
        "": {"e": torch.ones(7, dtype=BF16)},
    }


def layouts(groups=None) -> dict[str, Layout]:
    return {
        group: Layout.of({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
        for group, tensors in (groups or content()).items()
    }


def fill(builder: CacheBuilder) -> None:
    for group, tensors in content().items():
        for name, tensor in tensors.items():
            builder.writer(group).write(name, tensor)


def build(home, source, settings=SETTINGS, dtype=BF16) -> Cache:
    with CacheBuilder(home, source, settings, dtype, layouts()) as builder:
        fill(builder)
        return builder.commit()


def assert_whole(cache: Cache | None) -> None:
    """Every shard has what was written, bit for bit."""
    assert cache is not None
    for group, tensors in content().items():
        read = cache.tensors(group)
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def directories(home: Path) -> list[str]:
    return sorted(p.name for p in (home / "nf4").iterdir() if p.is_dir())


def refused(home, source, *rest) -> str:
    """What is said about a cache that is not used."""
    said: list[str] = []
    assert open_cache(home, source, *(rest or (SETTINGS, BF16)), said.append) is None
    assert len(said) == 1 and said[0].startswith(f"NF4 cache {home}")
    return said[0]


def test_what_was_built_is_opened(home, source):
    assert open_cache(home, source, SETTINGS, BF16, pytest.fail) is None
    built = build(home, source)
    opened = open_cache(home, source, SETTINGS, BF16, pytest.fail)
    assert opened is not None and opened.manifest == built.manifest
    assert opened.directory.name.startswith("a-model-") and directories(home) == [opened.directory.name]
    assert opened.groups == tuple(content()) and {g: opened.layout(g) for g in opened.groups} == layouts()
    assert opened.nbytes == sum(layout.nbytes for layout in layouts().values())
    assert_whole(opened)


def test_a_group_may_be_added_whose_tensors_were_not_known_before(home, source):
    with CacheBuilder(home, source, SETTINGS, BF16, {}) as builder:
        for group, tensors in content().items():
            builder.add(group, tensors)
        builder.commit()
    assert_whole(open_cache(home, source, SETTINGS, BF16))


def test_other_settings_have_another_cache(home, source):
    first = build(home, source)
    for settings, dtype in (({"quant_type": "fp4", "double_quant": True}, BF16), (SETTINGS, torch.float16)):
        assert open_cache(home, source, settings, dtype, pytest.fail) is None
        assert build(home, source, settings, dtype).directory != first.directory
    assert open_cache(home, replace(source, revision="c0ffee"), SETTINGS, BF16, pytest.fail) is None
    assert open_cache(home, source, SETTINGS, BF16, pytest.fail) is not None


def test_a_cache_of_other_tensors_is_not_used_and_the_next_build_replaces_it(home, source):
    with CacheBuilder(home, source, SETTINGS, BF16, {}) as builder:
        builder.add("model.layers.0", {"renamed": torch.ones(1)})
        builder.commit()
    said = []
    assert open_cache(home, source, SETTINGS, BF16, said.append, layouts()) is None
    assert "model.layers.0 are not those of the model" in said[0]
    build(home, source)
    assert_whole(open_cache(home, source, SETTINGS, BF16, pytest.fail, layouts()))


def test_changed_weights_of_the_same_size_make_a_cache_stale_and_the_next_build_replaces_it(home, source):
    build(home, source)
    with source.files[1].open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        last = f.read(1)
        f.seek(-1, os.SEEK_END)
        f.write(bytes([last[0] ^ 1]))
    assert "model-2.safetensors has changed since" in refused(home, source)
    build(home, source)
    assert_whole(open_cache(home, source, SETTINGS, BF16, pytest.fail))
    assert len(directories(home)) == 1


def test_touched_weights_are_hashed_once_and_the_cache_is_still_good(home, source, monkeypatch):
    build(home, source)
    os.utime(source.files[0], (1, 1))
    assert_whole(open_cache(home, source, SETTINGS, BF16, pytest.fail))
    monkeypatch.setattr(module, "_sha256", lambda path: pytest.fail("hashed again"))
    assert_whole(open_cache(home, source, SETTINGS, BF16, pytest.fail))


def test_links_into_a_hub_cache_are_followed(home, source, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, path in enumerate(source.files):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))
    build(home, source)
    assert_whole(open_cache(home, source, SETTINGS, BF16, pytest.fail))
    (blobs / "0").write_bytes(b"another size")
    assert "has changed since" in refused(home, source)


def test_another_set_of_files_makes_a_cache_stale(home, source):
    build(home, source)
    assert "other files" in refused(home, replace(source, files=source.files[:1]))


def test_weights_that_change_while_they_are_quantized_are_no_cache(home, source):
    with CacheBuilder(home, source, SETTINGS, BF16, layouts()) as builder:
        fill(builder)
        os.utime(source.files[0], (1, 1))
        with pytest.raises(CacheError, match=r"model-1\.safetensors: changed while"):
            builder.commit()
    assert directories(home) == []


@pytest.mark.parametrize("lost", [1, 4096])
def test_a_truncated_shard_is_seen_without_reading_it(home, source, lost):
    shard = build(home, source).directory / "model.layers.1.safetensors"
    os.truncate(shard, shard.stat().st_size - lost)
    assert "model.layers.1.safetensors is truncated" in refused(home, source)
    shard.unlink()
    assert "model.layers.1.safetensors: No such file" in refused(home, source)
    assert_whole(build(home, source))


def test_a_flipped_bit_is_an_error_that_names_file_and_tensor(home, source):
    cache = build(home, source)
    path = cache.directory / "model.layers.0.safetensors"
    content = bytearray(path.read_bytes())
    content[4096] ^= 1  # the first byte of the data
    path.write_bytes(content)
    reader = cache.reader("model.layers.0")
    with pytest.raises(CacheError, match=r"model\.layers\.0\.safetensors: w\.packed is not what was written"):
        reader.read_into(host_buffer(reader.padded_nbytes, torch.device("cpu")), verify=True)


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("shards", "", "file"), "../../secret", "damaged"),
        (("shards", "", "file"), "/etc/passwd", "damaged"),
        (("shards", "", "file"), "..", "damaged"),
        (("shards", "", "file"), "rest.safetensors\n", "damaged"),
        (("shards", "", "data_start"), 0, "damaged"),
        (("shards", "", "parts", "e", "shape"), [-7], "damaged"),
        (("shards", "", "parts", "e", "shape"), [2**70], "truncated"),
        (("shards", "", "parts", "e", "dtype"), "object", "damaged"),
        (("unheard",), 1, "damaged"),
        (("format",), 2, "has format 2"),
        (("settings",), {}, "made for settings"),
    ],
)
def test_a_manifest_that_is_not_ours_is_not_believed(home, source, path, value, why):
    manifest = build(home, source).directory / MANIFEST
    raw = json.loads(manifest.read_text())
    inside = raw
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    manifest.write_text(json.dumps(raw))
    assert why in refused(home, source)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "[" * 100_000, "\xff"])
def test_a_manifest_that_is_no_manifest_is_damaged(home, source, text):
    (build(home, source).directory / MANIFEST).write_bytes(text.encode("latin-1"))
    assert "damaged" in refused(home, source)


def test_a_shard_that_is_a_link_to_elsewhere_is_not_read(home, source, tmp_path):
    shard = build(home, source).directory / "rest.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert "is not a file" in refused(home, source)


def test_a_cache_without_a_manifest_is_not_used(home, source):
    (build(home, source).directory / MANIFEST).unlink()
    assert "no manifest.json" in refused(home, source)


def test_too_small_a_disk_is_said_before_anything_is_written(home, source, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(MachineError, match=r"a-model-.*needs .* 1\.0 MiB are free.*\n.*cache_dir"):
        CacheBuilder(home, source, SETTINGS, BF16, layouts())
    assert directories(home) == []


def test_a_stale_cache_makes_room_for_the_next_one(home, source, monkeypatch):
    stale = build(home, source).directory
    (stale / MANIFEST).write_text("{}")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0 if stale.exists() else 2**40))
    assert_whole(build(home, source))


def test_a_disk_that_is_full_midway_is_said_and_left_clean(home, source, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        pytest.raises(MachineError, match=r"No space left.*\n.*memory\.nf4_cache_dir"),
        CacheBuilder(home, source, SETTINGS, BF16, layouts()) as builder,
    ):
        builder.writer("").write("e", content()[""]["e"])
        monkeypatch.setattr(os, "pwrite", full)
        fill(builder)
    assert directories(home) == []


def test_a_home_that_cannot_be_written_is_said(tmp_path, source):
    (tmp_path / "home").write_text("a file")
    with pytest.raises(MachineError, match=r"cannot be written: .*\n.*memory\.nf4_cache_dir"):
        CacheBuilder(tmp_path / "home", source, SETTINGS, BF16, layouts())


def test_a_builder_that_lacks_a_tensor_does_not_commit(home, source):
    builder = CacheBuilder(home, source, SETTINGS, BF16, layouts())
    with pytest.raises(ValueError, match="not written"):
        builder.commit()
    assert directories(home) == []


def test_a_builder_that_is_forgotten_leaves_nothing(home, source):
    builder = CacheBuilder(home, source, SETTINGS, BF16, layouts())
    builder.writer("")
    assert len(directories(home)) == 1
    del builder
    assert directories(home) == []


CHILD = """
import sys
from pathlib import Path
import torch
from qlora.model.cache import CacheBuilder
from qlora.model.source import Source
sys.path.insert(0, sys.argv[3])
from test_cache import BF16, SETTINGS, assert_whole, fill, layouts

directory = Path(sys.argv[2])
source = Source("a model", directory, None, tuple(sorted(directory.glob("*.safetensors"))), None)
builder = CacheBuilder(Path(sys.argv[1]), source, SETTINGS, BF16, layouts())
fill(builder)
print("written", flush=True)
sys.stdin.readline()
assert_whole(builder.commit())
print("committed", flush=True)
"""


def child(home: Path, source: Source) -> subprocess.Popen[str]:
    """A process that has written all, and commits when it is sent a line."""
    here = Path(__file__)
    command = [sys.executable, "-c", CHILD, str(home), str(source.directory), str(here.parent)]
    environment = os.environ | {"PYTHONPATH": str(here.parents[2])}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def test_two_processes_that_build_at_once_both_end_with_the_cache(home, source):
    both = [child(home, source), child(home, source)]
    for process in both:
        assert process.stdout and process.stdout.readline() == "written\n"
    assert len(directories(home)) == 2  # neither has swept the other away
    for process in both:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0] for process in both] == ["committed\n"] * 2
    assert_whole(open_cache(home, source, SETTINGS, BF16, pytest.fail))
    assert len(directories(home)) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill")
def test_what_a_killed_builder_leaves_is_no_cache_and_the_next_builder_removes_it(home, source):
    process = child(home, source)
    assert process.stdout and process.stdout.readline() == "written\n"
    process.kill()
    process.communicate(timeout=60)
    assert len(directories(home)) == 1
    assert open_cache(home, source, SETTINGS, BF16, pytest.fail) is None
    assert_whole(build(home, source))
    assert directories(home) == [open_cache(home, source, SETTINGS, BF16).directory.name]


def test_what_a_process_elsewhere_writes_is_left_alone_for_a_day(home, source):
    theirs = home / "nf4" / "m.building-another-host-1-01234567"
    theirs.mkdir(parents=True)
    build(home, source)
    assert theirs.is_dir()
    os.utime(theirs, (1, 1))
    (theirs / "shard").write_text("just written")
    build(home, source, SETTINGS, torch.float16)
    assert theirs.is_dir()
    os.utime(theirs / "shard", (1, 1))
    os.utime(theirs, (1, 1))
    build(home, source, SETTINGS, torch.float32)
    assert not theirs.exists()


def test_where_caches_live(monkeypatch, tmp_path):
    assert cache_home(None) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home("auto") == tmp_path / "qlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_home("auto") == tmp_path / ".cache" / "qlora"
    assert cache_home("~/caches") == Path(os.path.expanduser("~/caches"))


def test_no_file_is_written_outside_the_directory(home, source):
    with CacheBuilder(home, source, SETTINGS, BF16, {"../up": Layout.of({})}) as builder, pytest.raises(ValueError):
        builder.writer("../up")
