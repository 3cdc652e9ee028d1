"""What reads files that anyone may have written, each as a function of bytes that lets only our own errors pass.

`test_fuzz_files` gives them changed seeds, `test_guided` whatever reaches more of our code. Imports stand where they
are needed: a fuzzer starts soon, its bound on memory is tight, and only what it is to reach is followed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RECIPE = b"""\
method: lora
model: {model_name_or_path: m, dtype: float32}
lora: &l
  r: 8
  target_modules: [q_proj, v_proj]
data:
  datasets:
  - path: "a.jsonl"   # one of two
    weight: 1e-1
  - {path: 'b', name: ~}
training: {learning_rate: 1e-4, seed: 0x10}
"""
ROWS = [
    {"messages": [{"role": "user", "content": "é\u2028🤗"}, {"role": "assistant", "content": "Hello."}]},
    {"messages": [{"role": "tool", "content": "4", "name": "f"}, {"role": "assistant", "content": "a", "weight": 0}]},
]


@dataclass(frozen=True)
class Target:
    """parse: takes any bytes; what it raises is a defect. seeds: files as they should be."""

    seeds: tuple[bytes, ...]
    parse: Callable[[bytes], None]


def recipe(place: Path) -> Target:
    from qlora.errors import RecipeError
    from qlora.recipe import dump_recipe, load_recipe, parse_recipe

    path = place / "recipe.yaml"

    def parse(content: bytes) -> None:
        path.write_bytes(content)
        try:
            config = load_recipe(path)
        except RecipeError as error:
            assert error.problems and str(error)
        else:
            assert parse_recipe(dump_recipe(config)) == config

    plain = {"model": {"model_name_or_path": "m"}, "data": {"datasets": [{"path": "a.jsonl"}]}}
    return Target((RECIPE, json.dumps(plain).encode()), parse)


def rows(place: Path, suffix: str, *seeds: bytes) -> Target:
    from qlora.config import DataConfig, DatasetConfig
    from qlora.data.problems import Problems
    from qlora.data.source import read_splits
    from qlora.errors import DataError

    path = place / f"rows{suffix}"
    recipe = DataConfig(datasets=[DatasetConfig(path=str(path))])

    def parse(content: bytes) -> None:
        path.write_bytes(content)
        try:
            train, _ = read_splits(recipe, problems=Problems(skip=True))
        except DataError as error:
            assert str(path) in str(error)
            return
        for row in train.conversations:
            assert row.text or row.messages[-1]["role"] == "assistant"
            assert all(turn["content"].strip() and "\0" not in turn["content"] for turn in row.messages)
            row.text.encode()

    return Target(seeds, parse)


def json_lines(place: Path) -> Target:
    return rows(place, ".jsonl", b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS))


def json_list(place: Path) -> Target:
    return rows(place, ".json", json.dumps(ROWS, indent=1).encode())


def csv(place: Path) -> Target:
    return rows(place, ".csv", b'prompt,completion\n"a ""b""\nc",d\ne,f\n')


def tsv(place: Path) -> Target:
    return rows(place, ".tsv", b"prompt\tcompletion\na\tb\n")


def text(place: Path) -> Target:
    return rows(place, ".txt", b"One.\n")


def parquet(place: Path) -> Target:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), place / "seed.parquet")
    return rows(place, ".parquet", (place / "seed.parquet").read_bytes())


def gguf_header(place: Path) -> Target:
    import gguf
    import numpy as np

    from qlora.errors import ModelError
    from qlora.model.gguf_header import check_gguf

    path = place / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "d"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.0])
    writer.add_bool("x.bool", True)
    writer.add_tensor("token_embd.weight", np.ones((3, 4), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 2), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def parse(content: bytes) -> None:
        path.write_bytes(content)
        try:
            check_gguf(path)
        except ModelError as error:
            assert str(path) in str(error)
            return
        reader = gguf.GGUFReader(path)  # what is accepted, the library that everyone uses reads too
        assert all(t.data.nbytes == t.n_bytes for t in reader.tensors)

    return Target((path.read_bytes(),), parse)


def _model(place: Path, changed: str) -> Target:
    """A directory with two shards and an index, of which one file is changed."""
    import torch
    from safetensors.torch import save_file

    from qlora.config import ModelConfig
    from qlora.errors import ModelError
    from qlora.model.source import INDEX, open_source

    directory = place / f"changed-{changed}"
    directory.mkdir()
    save_file({"a": torch.ones(4, 4), "b": torch.zeros(8)}, directory / "m-1.safetensors")
    save_file({"c": torch.ones(2, dtype=torch.bfloat16)}, directory / "m-2.safetensors")
    placed = {name: f"m-{1 + (name == 'c')}.safetensors" for name in "abc"}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 100}, "weight_map": placed}))
    path = directory / (INDEX if changed == "index" else "m-1.safetensors")
    section = ModelConfig(model_name_or_path=str(directory))

    def parse(content: bytes) -> None:
        path.write_bytes(content)
        try:
            source = open_source(section)
        except ModelError as error:
            assert str(directory) in str(error)
        else:
            assert all(path.parent == directory for path in source.files)
            source.fingerprint()

    return Target((path.read_bytes(),), parse)


def safetensors_header(place: Path) -> Target:
    return _model(place, "shard")


def index(place: Path) -> Target:
    return _model(place, "index")


def checkpoint_manifest(place: Path) -> Target:
    from qlora.durable import MANIFEST, Damaged, new_directory, verify

    directory = place / "saved"
    with new_directory(directory) as draft:
        draft.write("state.json", b"{}")
        draft.write("weights.safetensors", b"x" * 100)
    (place / "outside").write_bytes(b"{}")

    def parse(content: bytes) -> None:
        (directory / MANIFEST).write_bytes(content)
        try:
            files = verify(directory)
        except Damaged as error:
            assert str(error)
        else:
            assert files.keys() <= {"state.json", "weights.safetensors"}

    return Target(((directory / MANIFEST).read_bytes(),), parse)


def cache_manifest(place: Path) -> Target:
    import torch
    from safetensors.torch import save_file

    from qlora.durable import MANIFEST
    from qlora.errors import ModelError
    from qlora.model.cache import CacheBuilder, open_cache
    from qlora.model.shards import Layout
    from qlora.model.source import Source

    directory = place / "source"
    directory.mkdir()
    save_file({"w": torch.ones(4)}, directory / "m.safetensors")
    source = Source("m", directory, None, (directory / "m.safetensors",), None)
    layouts = {"a": Layout.of({"w": (torch.float32, (4,))}), "b": Layout.of({"v": (torch.uint8, (3, 5))})}
    with CacheBuilder(place / "home", source, {}, torch.float32, layouts) as builder:
        builder.writer("a").write("w", torch.ones(4))
        builder.writer("b").write("v", torch.ones(3, 5, dtype=torch.uint8))
        path = builder.commit().directory / MANIFEST

    def parse(content: bytes) -> None:
        path.write_bytes(content)
        said: list[str] = []
        found = open_cache(place / "home", source, {}, torch.float32, said.append)
        assert (found is None) == bool(said)
        if found is None:
            return
        for group in found.groups:
            try:
                found.tensors(group)
            except ModelError as error:
                assert str(path.parent) in str(error)

    return Target((path.read_bytes(),), parse)


def run_log(place: Path) -> Target:
    from qlora.report.runs import LOG, read_run

    events = [
        {"event": "start", "time": 1.0, "steps": 9, "first_step": 0},
        {"event": "step", "time": 2.0, "step": 1, "loss": 2.5, "tokens_per_second": 100.0},
        {"event": "evaluation", "time": 2.0, "step": 1, "eval_loss": 2.0},
        {"event": "end", "time": 3.0, "step": 1, "tokens_per_second": 77.0, "stopped": None},
    ]

    def parse(content: bytes) -> None:
        (place / LOG).write_bytes(content)
        assert read_run(place).said

    whole = [json.dumps(event).encode() + b"\n" for event in events]
    return Target((b"".join(whole), b"".join(whole[:3]), b"".join([*whole, whole[0]])), parse)


TARGETS: dict[str, Callable[[Path], Target]] = {
    made.__name__: made
    for made in (
        recipe,
        json_lines,
        json_list,
        csv,
        tsv,
        text,
        parquet,
        gguf_header,
        safetensors_header,
        index,
        checkpoint_manifest,
        cache_manifest,
        run_log,
    )
}
