"""Any bytes where a recipe, rows, a header or a manifest should be: read, or refused with an error of ours."""

import json
import re
import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.torture.targets import TARGETS, Target

pytestmark = pytest.mark.torture

NUMBERS = [0, 1, 31, 0x7F, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1]
PIECES = [b"[", b"]", b'"', b"\\", b"\xff", b"\0", b"\n", b"9" * 5000, b"[" * 3000, b"\\ud800"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutations(draw: st.DrawFn, content: bytes) -> bytes:
    """These bytes with some flipped, lengths and troublesome pieces spliced in, parts doubled or cut out, or the end
    missing."""
    mutated = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at, piece = draw(st.integers(0, max(len(mutated) - 1, 0))), draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["flip", "splice", "insert", "double", "cut", "truncate"]))
        if kind == "flip" and mutated:
            mutated[at] ^= 1 << piece % 8
        elif kind == "splice":
            mutated[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(NUMBERS)))
        elif kind == "insert":
            mutated[at : at + piece % 8] = draw(st.sampled_from(PIECES) | st.binary(max_size=4))
        elif kind == "double":
            mutated[at:at] = mutated[at : at + piece]
        elif kind == "cut":
            del mutated[at : at + piece]
        elif kind == "truncate":
            del mutated[at:]
    return bytes(mutated)


@st.composite
def changed_json(draw: st.DrawFn, text: bytes):
    """This JSON with the value at one place exchanged for any other, or taken away."""
    changed = there = json.loads(text)
    while True:
        key = draw(st.sampled_from(list(there) if isinstance(there, dict) else list(range(len(there)))))
        if isinstance(there[key], dict | list) and there[key] and draw(st.booleans()):
            there = there[key]
        elif draw(st.integers(0, 4)):
            there[key] = draw(JSON | st.sampled_from([*NUMBERS, -1, "../x", "/etc/passwd", "a\\b", "x" * 300]))
            return changed
        else:
            del there[key]
            return changed


def contents(name: str, seeds: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    """What a file of this kind may hold."""
    values = [JSON, *(changed_json(seed) for seed in seeds if _is_json(seed))]
    found = [mutations(seed) for seed in seeds]
    found += [st.binary(max_size=200), *(value.map(lambda value: json.dumps(value).encode()) for value in values)]
    if name == "recipe":
        found.append(st.text().map(str.encode))
        found += [value.map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode()) for value in values]
    return st.one_of(found)


def _is_json(content: bytes) -> bool:
    try:
        return bool(json.loads(content))
    except ValueError:
        return False


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Less than 64 MiB more of address space than there is now: what would allocate by a header's word, fails."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# ---- any bytes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TARGETS)
def target(request, tmp_path_factory) -> tuple[Target, st.SearchStrategy[bytes]]:
    made = TARGETS[request.param](tmp_path_factory.mktemp(request.param))
    for seed in made.seeds:
        made.parse(seed)  # and so imports all that it takes, before memory is bounded
    return made, contents(request.param, made.seeds)


@settings(deadline=None)
@given(data=st.data())
def test_any_bytes_are_read_or_an_error_of_ours_in_little_memory(target, data):
    made, found = target
    content = data.draw(found)
    with _bounded_memory():
        made.parse(content)


# ---- absurd ones, up to some MB --------------------------------------------------------------------------------------

DEEP, NAMES = b"[" * (1 << 18), [b"%d" % number for number in range(1 << 16)]
ABSURD = {
    ("recipe", "4 MB"): b" " * (4 << 20),
    ("recipe", "lists in lists"): b"a: " + DEEP[:250_000],
    ("recipe", "keys of keys"): b"? " * 125_000,
    ("recipe", "text without an end"): b"a: '" + b"''" * 125_000,
    ("recipe", "keys"): b": 1\n".join(NAMES[:32_000]),
    ("recipe", "aliases of aliases"): b"a: &a0 []\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 99)),
    ("recipe", "digits"): b"a: " + b"9" * 250_000,
    ("json_lines", "a key twice among many"): b'{"0": 0, "%s": 0, "0": 0}' % b'": 0, "'.join(NAMES[1:]),
    ("json_lines", "lists in lists"): DEEP,
    ("json_lines", "digits"): b'{"text": "a", "n": %s}' % (b"9" * (4 << 20)),
    ("json_list", "text without an end"): b'[{"text": "' + b'x\\"' * (1 << 20),
    ("json_list", "objects without an end"): b"[" + b"{" * (1 << 18),
    ("csv", "a cell without an end"): b"text\n" + b'"' * ((1 << 21) + 1),
    ("csv", "columns of one name"): b"a," * (1 << 19),
    ("gguf_header", "entries"): b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 16) + bytes(4 << 20),
    ("gguf_header", "a list of texts"): b"GGUF"
    + struct.pack("<IQQQcIIQ", 3, 1, 1, 1, b"k", 9, 8, 1 << 19)
    + bytes(4 << 20),
    ("safetensors_header", "a header of 2**62 bytes"): struct.pack("<Q", 1 << 62) + bytes(4 << 20),
    ("safetensors_header", "lists in lists"): struct.pack("<Q", len(DEEP)) + DEEP,
    ("index", "lists in lists"): b'{"weight_map": ' + DEEP,
    ("index", "names"): b'{"weight_map": {"%s": 0}}' % b'": "m-1.safetensors", "'.join(NAMES),
    ("checkpoint_manifest", "4 MB"): b" " * (4 << 20),
    ("checkpoint_manifest", "lists in lists"): b'{"files": ' + DEEP,
    ("cache_manifest", "lists in lists"): b'{"format": 1, "shards": ' + DEEP,
    ("run_log", "lists in lists"): b'{"event": "start", "steps": %s\n' % DEEP,
    ("run_log", "a line of 4 MB"): b'{"event": "start", "steps": %s\n' % (b"9" * (4 << 20)),
}


@pytest.mark.parametrize(("name", "what"), ABSURD)
def test_an_absurd_file_takes_seconds_and_less_than_64_mib(name, what, tmp_path):
    target = TARGETS[name](tmp_path)
    target.parse(target.seeds[0])
    began = time.process_time()
    tracemalloc.start()
    try:
        with _bounded_memory():
            target.parse(ABSURD[name, what])
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 10  # most take less than one; what goes with the square, hours


def test_a_cache_whose_manifest_is_absurd_is_not_used(tmp_path):
    target = TARGETS["cache_manifest"](tmp_path)
    # A product of millions of digits; more bytes than there may be memory for.
    shape = b'"shape": [%s' % b", ".join([b"9" * 18] * (1 << 17))
    for content in (re.sub(rb'"shape": \[[^]]*', shape, target.seeds[0]), bytes(80 << 20)):
        began = time.process_time()
        with _bounded_memory():
            target.parse(content)
        assert time.process_time() - began < 10
