"""One layer in one file: laid out without holes, written in any order, read as it was written or not at all."""

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora.errors import CacheError, MachineError
from qlora.model import shards
from qlora.model.nf4 import FourBit, quantize
from qlora.model.shards import HEADER, Layout, Part, ShardReader, ShardWriter
from qlora.model.transfer import PAGE, host_buffer

CPU = torch.device("cpu")
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
DTYPES = st.sampled_from(list(shards.DTYPES.values()))
TENSORS = st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(DTYPES, SHAPES), max_size=8)


def layer() -> dict[str, torch.Tensor]:
    """What a decoder layer has on the disk: four-bit weights and a dense norm."""
    torch.manual_seed(0)
    tensors = {"norm.weight": torch.randn(96, dtype=torch.bfloat16)}
    for name, shape in {"up": (256, 96), "down": (96, 256)}.items():
        tensors |= {f"{name}.weight.{part}": t for part, t in quantize(torch.randn(shape), FourBit()).items()}
    return tensors


def layout_of(tensors: dict[str, torch.Tensor]) -> Layout:
    return Layout.of({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})


def write(path, tensors) -> dict:
    writer = ShardWriter(path, layout_of(tensors))
    for name in sorted(tensors):
        writer.write(name, tensors[name])
    return writer.close()


def open_reader(path, tensors, record) -> ShardReader:
    checksums = {HEADER: record["header_crc32"]} | {name: part["crc32"] for name, part in record["parts"].items()}
    return ShardReader(path, layout_of(tensors), record["data_start"], checksums)


@pytest.fixture
def shard(tmp_path):
    tensors = layer()
    path = tmp_path / "model.layers.0.safetensors"
    return path, tensors, write(path, tensors)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 2 * PAGE)


def assert_bits_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        b = theirs[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), name


@given(TENSORS)
def test_a_layout_has_no_holes_and_each_part_starts_at_its_own_power_of_two(tensors):
    layout = Layout.of(tensors)
    end = 0
    for part in layout.parts:
        assert part.offset == end
        end += part.nbytes
        assert part.offset % min(part.nbytes & -part.nbytes or PAGE, PAGE) == 0
        assert part.offset % part.dtype.itemsize == 0
    assert layout.nbytes == end <= layout.padded_nbytes < end + PAGE and layout.padded_nbytes % PAGE == 0
    assert {p.name: (p.dtype, p.shape) for p in layout.parts} == tensors
    assert Layout.of(dict(reversed(tensors.items()))) == layout


def test_a_real_layer_is_aligned_to_256_bytes():
    shapes = {"q": (4096, 4096), "k": (1024, 4096), "gate": (14336, 4096), "small": (576, 1536)}
    tensors = {"norm": (torch.bfloat16, (4096,))}
    for name, (rows, columns) in shapes.items():
        n = rows * columns
        tensors |= {f"{name}.packed": (torch.uint8, (n // 2, 1)), f"{name}.absmax": (torch.uint8, (n // 64,))}
        tensors |= {f"{name}.nested_absmax": (torch.float32, (-(-n // 64 // 256),))}
        tensors |= {f"{name}.nested_code": (torch.float32, (256,)), f"{name}.nested_offset": (torch.float32, ())}
    for part in Layout.of(tensors).parts:
        assert part.offset % 256 == 0 or part.nbytes < 256, part


def test_views_share_the_buffers_memory_down_to_empty_and_scalar_tensors():
    layout = Layout.of({"a": (torch.float32, ()), "b": (torch.bfloat16, (3, 5)), "c": (torch.int64, (0, 4))})
    buffer = torch.zeros(layout.nbytes + 7, dtype=torch.uint8)
    views = layout.views(buffer)
    assert {name: (v.dtype, tuple(v.shape)) for name, v in views.items()} == {
        p.name: (p.dtype, p.shape) for p in layout.parts
    }
    views["a"].fill_(1.0)
    views["b"].fill_(1.0)
    assert buffer.count_nonzero() == 2 + 2 * 15  # 1.0 is 00 00 80 3f, and 80 3f
    with FakeTensorMode():
        fake = layout.views(torch.empty(layout.padded_nbytes, dtype=torch.uint8))
    assert fake["b"].shape == (3, 5) and fake["b"].dtype == torch.bfloat16


@pytest.mark.parametrize("threads", [0, 3])
def test_four_bit_weights_come_back_bit_for_bit(shard, small_chunks, threads):
    path, tensors, record = shard
    reader = open_reader(path, tensors, record)
    assert len(reader.chunks()) > 3
    buffer = host_buffer(reader.padded_nbytes, CPU)
    if threads:
        with ThreadPoolExecutor(threads) as readers:
            reader.read_into(buffer, readers, verify=True)
    else:
        reader.read_into(buffer, verify=True)
    assert_bits_equal(reader.layout.views(buffer), tensors)


def test_chunks_through_a_staging_buffer_make_up_the_shard(shard, small_chunks):
    path, tensors, record = shard
    reader = open_reader(path, tensors, record)
    staging, device = host_buffer(shards.CHUNK, CPU), torch.empty(reader.layout.nbytes, dtype=torch.uint8)
    for k, chunk in enumerate(reader.chunks()):
        nbytes = reader.read_chunk(k, staging)
        device[chunk] = staging[:nbytes]
    reader.verify(device)
    assert_bits_equal(reader.layout.views(device), tensors)


def test_safetensors_reads_a_shard(shard):
    path, tensors, record = shard
    with safe_open(path, framework="pt") as f:
        assert_bits_equal({name: f.get_tensor(name) for name in f.keys()}, tensors)  # noqa: SIM118 - no dict
    assert record["data_start"] % PAGE == 0 and record["size"] == path.stat().st_size


@settings(max_examples=25)
@given(tensors=TENSORS)
def test_safetensors_reads_shards_of_any_tensors(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("any") / "any.safetensors"
    content = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in tensors.items()}
    record = write(path, content)
    with safe_open(path, framework="pt") as f:
        assert_bits_equal({name: f.get_tensor(name) for name in f.keys()}, content)  # noqa: SIM118 - no dict
    reader = open_reader(path, content, record)
    buffer = host_buffer(reader.padded_nbytes, CPU)
    reader.read_into(buffer, verify=True)
    assert_bits_equal(reader.layout.views(buffer), content)


def test_threads_write_one_shard(tmp_path):
    tensors = {str(i): torch.full((1000 + i,), i, dtype=torch.int32) for i in range(40)}
    writer = ShardWriter(tmp_path / "s.safetensors", layout_of(tensors))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda item: writer.write(*item), tensors.items()))
    record = writer.close()
    assert writer.close() == record
    reader = open_reader(writer.path, tensors, record)
    buffer = host_buffer(reader.padded_nbytes, CPU)
    reader.read_into(buffer, verify=True)
    assert_bits_equal(reader.layout.views(buffer), tensors)


def test_a_tensor_that_is_not_written_or_not_what_was_promised_is_an_error(tmp_path):
    writer = ShardWriter(tmp_path / "s", Layout.of({"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}))
    writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match=r"b is torch\.float16"):
        writer.write("b", torch.ones(2, dtype=torch.float16))
    with pytest.raises(ValueError, match="1 tensors were not written, b first"):
        writer.close()
    writer.abort()
    assert not writer.path.exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_the_file_is_found(shard, where, bit):
    path, tensors, record = shard
    content = bytearray(path.read_bytes())
    at = int(where * len(content))
    content[at] ^= 1 << bit
    broken = path.with_name("broken.safetensors")
    broken.write_bytes(content)
    with pytest.raises(CacheError, match="checksum differs") as caught:
        reader = open_reader(broken, tensors, record)
        reader.read_into(host_buffer(reader.padded_nbytes, CPU), verify=True)
    data = at - record["data_start"]
    culprit = next((p.name for p in layout_of(tensors).parts if p.offset <= data < p.offset + p.nbytes), "its header")
    assert str(broken) in str(caught.value) and culprit in str(caught.value)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("lost", [1, 3 * PAGE, 5 * PAGE + 17])
def test_a_file_that_ends_early_is_an_error_that_names_it(shard, small_chunks, monkeypatch, direct, lost):
    path, tensors, record = shard
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    reader = open_reader(path, tensors, record)
    os.truncate(path, record["size"] - lost)
    with pytest.raises(CacheError, match=r"layers\.0\.safetensors: truncated.*\n.*delete the directory"):
        reader.read_into(host_buffer(reader.padded_nbytes, CPU))


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no direct reads")
@pytest.mark.parametrize("refusal", ["open", "preadv"])
def test_a_file_system_without_direct_reads_is_read_through_the_page_cache(shard, monkeypatch, refusal):
    path, tensors, record = shard
    original, seen = getattr(os, refusal), []

    def refuse(first, *rest):
        seen.append(first)
        if (rest[0] & os.O_DIRECT) if refusal == "open" else len(seen) == 1:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(first, *rest)

    monkeypatch.setattr(os, refusal, refuse)
    reader = open_reader(path, tensors, record)
    buffer = host_buffer(reader.padded_nbytes, CPU)
    reader.read_into(buffer, verify=True)
    assert not reader.direct and len(seen) >= 2
    assert_bits_equal(reader.layout.views(buffer), tensors)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_failing_disk_is_an_error_that_names_the_file(shard, small_chunks, monkeypatch, threads):
    path, tensors, record = shard
    reader = open_reader(path, tensors, record)
    original = os.preadv

    def fail_late(fd, buffers, offset):
        if offset > record["data_start"]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail_late)
    readers = ThreadPoolExecutor(threads) if threads else None
    with pytest.raises(CacheError, match=r"layers\.0\.safetensors: Input/output error"):
        reader.read_into(host_buffer(reader.padded_nbytes, CPU), readers)


def test_a_buffer_is_no_longer_written_to_once_its_read_has_failed(shard, small_chunks, monkeypatch):
    path, tensors, record = shard
    reader = open_reader(path, tensors, record)
    failed, late = threading.Event(), []

    def one_fails_while_another_reads(fd, buffers, offset):
        if offset == reader.data_start:
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        failed.wait()
        time.sleep(0.05)
        late.append(offset)
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", one_fails_while_another_reads)
    with ThreadPoolExecutor(2) as readers:
        with pytest.raises(CacheError):
            reader.read_into(host_buffer(reader.padded_nbytes, CPU), readers)
        assert len(late) == len(reader.chunks()) - 1


def test_short_reads_and_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    write_some, read_some = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, content, offset: write_some(fd, content[:5000], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: read_some(fd, [views[0][:PAGE]], offset))
    tensors = layer()
    record = write(tmp_path / "s", tensors)
    reader = open_reader(tmp_path / "s", tensors, record)
    buffer = host_buffer(reader.padded_nbytes, CPU)
    reader.read_into(buffer, verify=True)
    assert_bits_equal(reader.layout.views(buffer), tensors)


def test_a_full_disk_is_an_error_with_numbers(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path / "s", Layout.of({"a": (torch.float32, (2,))}))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MachineError, match=r"No space left.*GiB.*\n.*memory\.nf4_cache_dir"):
        writer.write("a", torch.ones(2))


def test_a_buffer_that_direct_reads_cannot_fill_is_refused(shard):
    path, tensors, record = shard
    reader = open_reader(path, tensors, record)
    for wrong in (host_buffer(reader.padded_nbytes - 1, CPU), host_buffer(reader.padded_nbytes + 1, CPU)[1:]):
        with pytest.raises(ValueError, match="page's start"):
            reader.read_into(wrong)


def test_a_part_counts_its_bytes():
    assert Part("a", torch.bfloat16, (3, 5), 0).nbytes == 30
    assert Part("a", torch.float32, (), 0).nbytes == 4
