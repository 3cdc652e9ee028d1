"""A GGUF header is read against the file's true size, or refused with the byte where it goes wrong."""

import re
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from qlora.errors import ModelError
from qlora.model.gguf_header import check_gguf

QUICKSTART = Path(__file__).parents[2] / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def written(path: Path, alignment: int | None = None) -> Path:
    """A small whole GGUF file with an entry of every kind and tensors of two."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "élan"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.0, 2.0])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for kind, value in (("uint8", 1), ("int8", -1), ("uint16", 2), ("int16", -2), ("int32", -3), ("int64", -4)):
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_uint64("x.uint64", 5)
    writer.add_float64("x.float64", 0.25)
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    blocks = gguf.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def header(*entries: bytes, tensors: list[bytes] = [], n_tensors=None, n_entries=None, version=3) -> bytes:  # noqa: B006
    counts = (len(tensors) if n_tensors is None else n_tensors, len(entries) if n_entries is None else n_entries)
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, length: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + content


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    dims = struct.pack("<I", len(shape) if n_dims is None else n_dims) + struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize("alignment", [None, 64])
def test_what_the_gguf_package_writes_is_accepted(alignment, tmp_path):
    numbers = check_gguf(written(tmp_path / "m.gguf", alignment))
    assert numbers["llama.block_count"] == 2
    assert (numbers["x.int64"], numbers["x.uint64"], numbers["x.float64"]) == (-4, 5, 0.25)


def test_the_quickstarts_model_is_checked_in_a_moment():
    if not QUICKSTART.exists():
        pytest.skip("recipes/fetch_smollm2.py has not fetched it")
    started = time.perf_counter()
    assert check_gguf(QUICKSTART)["llama.block_count"] == 30
    assert time.perf_counter() - started < 0.5  # 0.04 s on two cores; 98,000 texts


def test_every_truncation_is_refused(tmp_path):
    content = written(tmp_path / "m.gguf").read_bytes()
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    end = max(t.data_offset + t.n_bytes for t in reader.tensors)  # the writer pads the last tensor
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, reader.data_offset, 7), end - 1]:
        cut.write_bytes(content[:size])
        with pytest.raises(ModelError, match=re.escape(str(cut))):
            check_gguf(cut)


HUGE = 1 << 62
SPACE = b"\0" * 4096
HOSTILE = {
    "magic": (b"GGUX" + SPACE, "not a GGUF file"),
    "version": (header(version=1) + SPACE, "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + SPACE, "big-endian"),
    "tensor count": (header(n_tensors=HUGE) + SPACE, f"{HUGE:,} tensors"),
    "entry count": (header(n_entries=HUGE) + SPACE, f"{HUGE:,} metadata entries"),
    "counts that the space would allow": (header(n_entries=1 << 17) + b"\0" * (1 << 21), "more than there can be"),
    "key length": (header(text(b"k", HUGE), n_entries=1) + SPACE, "a key of"),
    "key twice": (header(entry(b"k", 4, b"\0" * 4), entry(b"k", 4, b"\0" * 4)) + SPACE, "there twice"),
    "key not UTF-8": (header(entry(b"\xff", 4, b"\0" * 4)) + SPACE, "not UTF-8"),
    "text length": (header(entry(b"k", 8, text(b"v", HUGE))) + SPACE, "a text of"),
    "text that wraps around": (header(entry(b"k", 8, text(b"v", (1 << 64) - 8))) + SPACE, "a text of"),
    "array length": (header(entry(b"k", 9, array(0, HUGE))) + SPACE, "values in lists"),
    "array of texts": (header(entry(b"k", 9, array(8, HUGE))) + SPACE, "values in lists"),
    "array of arrays": (header(entry(b"k", 9, array(9, 1, array(9, 1)))) + SPACE, "list of lists"),
    "type of value": (header(entry(b"k", 99, b"")) + SPACE, "99 is no type"),
    "alignment zero": (header(entry(b"general.alignment", 4, struct.pack("<I", 0))) + SPACE, "power of two"),
    "alignment of 48": (header(entry(b"general.alignment", 4, struct.pack("<I", 48))) + SPACE, "power of two"),
    "alignment as text": (header(entry(b"general.alignment", 8, text(b"32"))) + SPACE, "32-bit number"),
    "dimensions": (header(tensors=[tensor(b"t", (1,), n_dims=1 << 31)]) + SPACE, "dimensions"),
    "no elements": (header(tensors=[tensor(b"t", (4, 0))]) + SPACE, "rows of 4"),
    "size": (header(tensors=[tensor(b"t", (1 << 40, 1 << 40))]) + SPACE, "is said to end"),
    "offset": (header(tensors=[tensor(b"t", (4,), offset=1 << 60)]) + SPACE, "is said to end"),
    "offset not aligned": (header(tensors=[tensor(b"t", (4,), offset=3)]) + SPACE, "multiple of 32"),
    "block size": (header(tensors=[tensor(b"t", (33,), kind=8)]) + SPACE, "blocks of 32"),
    "type of tensor": (header(tensors=[tensor(b"t", (32,), kind=4)]) + SPACE, "unknown type 4"),
    "tensor twice": (header(tensors=[tensor(b"t", (4,)), tensor(b"t", (4,), offset=32)]) + SPACE, "there twice"),
    "overlap": (header(tensors=[tensor(b"a", (32,)), tensor(b"b", (4,), offset=32)]) + SPACE, "overlaps"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_by_what_is_wrong_and_takes_no_memory(case, tmp_path):
    content, said = HOSTILE[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=re.escape(said)):
            check_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
