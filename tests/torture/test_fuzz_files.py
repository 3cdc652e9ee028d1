"""Any bytes where a recipe, a header or a manifest should be: read, or refused with an error of ours. Nothing else."""

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qlora.config import ModelConfig
from qlora.durable import MANIFEST, Damaged, new_directory, verify
from qlora.errors import ModelError, RecipeError
from qlora.model.cache import Cache, CacheBuilder, open_cache
from qlora.model.gguf_header import check_gguf
from qlora.model.shards import Layout
from qlora.model.source import Source, open_source
from qlora.recipe import dump_recipe, parse_recipe

pytestmark = pytest.mark.torture

RECIPE = dump_recipe(parse_recipe("model: {model_name_or_path: m}\ndata: {datasets: [{path: a.jsonl}]}\n"))
NUMBERS = [0, 1, 31, 0x7F, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutations(draw: st.DrawFn, content: bytes, upto: int | None = None) -> bytes:
    """These bytes with some flipped, lengths spliced in, pieces doubled or cut out, or the end missing."""
    mutated, most = bytearray(content), upto or len(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(min(most, len(mutated)) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "splice", "double", "cut", "truncate"]))
        piece = draw(st.integers(1, 64))
        if kind == "flip" and mutated:
            mutated[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "splice":
            mutated[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(NUMBERS)))
        elif kind == "double":
            mutated[at:at] = mutated[at : at + piece]
        elif kind == "cut":
            del mutated[at : at + piece]
        elif kind == "truncate":
            del mutated[at:]
    return bytes(mutated)


@st.composite
def changed_json(draw: st.DrawFn, value):
    """This JSON with the value at one place exchanged for any other, or taken away."""
    changed = json.loads(json.dumps(value))
    there = changed
    while True:
        keys = list(there) if isinstance(there, dict) else list(range(len(there)))
        key = draw(st.sampled_from(keys))
        if isinstance(there[key], dict | list) and there[key] and draw(st.booleans()):
            there = there[key]
        elif draw(st.integers(0, 4)):
            there[key] = draw(JSON | st.sampled_from([*NUMBERS, -1, "../x", "/etc/passwd", "a\\b", "x" * 300]))
            return changed
        else:
            del there[key]
            return changed


# ---- recipes ---------------------------------------------------------------------------------------------------------


@given(st.text() | mutations(RECIPE.encode()).map(lambda b: b.decode("utf-8", "replace")))
def test_any_text_is_a_recipe_or_a_recipe_error(text):
    _recipe(text)


@given(JSON | changed_json(yaml.safe_load(RECIPE)))
def test_any_value_is_a_recipe_or_a_recipe_error(value):
    _recipe(json.dumps(value))
    _recipe(yaml.safe_dump(value, allow_unicode=True))


def _recipe(text: str) -> None:
    try:
        config = parse_recipe(text)
    except RecipeError as error:
        assert error.problems and str(error)
    else:
        assert parse_recipe(dump_recipe(config)) == config


# ---- headers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def _gguf(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "d"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.0])
    writer.add_bool("x.bool", True)
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.ones((32, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


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


@given(data=st.data())
def test_any_gguf_header_is_read_or_a_model_error_in_little_memory(place, data):
    whole = _gguf(place / "whole.gguf")
    header = len(whole) - 3 * 32 * 4 - 32 * 32 * 2  # the interesting part
    path = place / "m.gguf"
    path.write_bytes(data.draw(mutations(whole, upto=header)))
    with _bounded_memory():
        try:
            check_gguf(path)
        except ModelError as error:
            assert str(path) in str(error)
            return
    reader = gguf.GGUFReader(path)  # what is accepted, the library that everyone uses reads too
    assert all(t.data.nbytes == t.n_bytes for t in reader.tensors)


@pytest.fixture(scope="module")
def shards(place) -> dict[str, bytes]:
    directory = place / "whole"
    directory.mkdir()
    save_file({"a": torch.ones(4, 4), "b": torch.zeros(8)}, directory / "m-1.safetensors")
    save_file({"c": torch.ones(2, dtype=torch.bfloat16)}, directory / "m-2.safetensors")
    index = {"metadata": {"total_size": 100}, "weight_map": {n: f"m-{1 + (n == 'c')}.safetensors" for n in "abc"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _opened(place: Path, files: dict[str, bytes]) -> None:
    directory = place / "model"
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    with _bounded_memory():
        try:
            source = open_source(ModelConfig(model_name_or_path=str(directory)))
        except ModelError as error:
            assert str(directory) in str(error)
        else:
            assert all(path.parent == directory for path in source.files)
            source.fingerprint()


@given(data=st.data())
def test_any_safetensors_header_is_read_or_a_model_error_in_little_memory(place, shards, data):
    content = data.draw(mutations(shards["m-1.safetensors"]))
    _opened(place, shards | {"m-1.safetensors": content})


@given(data=st.data())
def test_any_index_is_read_or_a_model_error(place, shards, data):
    index = shards["model.safetensors.index.json"]
    changed = changed_json(json.loads(index)).map(lambda value: json.dumps(value).encode())
    _opened(place, shards | {"model.safetensors.index.json": data.draw(mutations(index) | changed)})


# ---- manifests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(place) -> tuple[Path, bytes]:
    with new_directory(place / "saved") as draft:
        draft.write("state.json", b"{}")
        draft.write("weights.safetensors", b"x" * 100)
    (place / "outside").write_bytes(b"{}")
    return place / "saved", (place / "saved" / MANIFEST).read_bytes()


@given(data=st.data())
def test_any_manifest_of_a_checkpoint_is_what_is_there_or_damaged(saved, data):
    directory, whole = saved
    changed = changed_json(json.loads(whole)).map(lambda value: json.dumps(value).encode())
    (directory / MANIFEST).write_bytes(data.draw(mutations(whole) | changed))
    try:
        files = verify(directory)
    except Damaged as error:
        assert str(error)
    else:
        assert files.keys() <= {"state.json", "weights.safetensors"}


@pytest.fixture(scope="module")
def built(place) -> tuple[Source, Cache, bytes]:
    (place / "source").mkdir()
    save_file({"w": torch.ones(4)}, place / "source" / "m.safetensors")
    source = Source("m", place / "source", None, (place / "source" / "m.safetensors",), None)
    layout = {"a": Layout.of({"w": (torch.float32, (4,))}), "b": Layout.of({"v": (torch.uint8, (3, 5))})}
    with CacheBuilder(place / "home", source, {}, torch.float32, layout) as builder:
        builder.writer("a").write("w", torch.ones(4))
        builder.writer("b").write("v", torch.ones(3, 5, dtype=torch.uint8))
        cache = builder.commit()
    return source, cache, (cache.directory / MANIFEST).read_bytes()


@given(data=st.data())
def test_any_manifest_of_a_cache_is_the_cache_or_not_used_and_said_why(place, built, data):
    source, cache, whole = built
    changed = changed_json(json.loads(whole)).map(lambda value: json.dumps(value).encode())
    (cache.directory / MANIFEST).write_bytes(data.draw(mutations(whole) | changed))
    said: list[str] = []
    with _bounded_memory():
        found = open_cache(place / "home", source, {}, torch.float32, said.append)
    if found is None:
        assert said
        return
    for group in found.groups:
        try:
            found.tensors(group)
        except ModelError as error:
            assert str(cache.directory) in str(error)
