"""A merged model is the adapter in its base, to the rounding of its dtype, in plain transformers; and whole, or not
there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora import durable
from qlora.errors import AdapterError, MachineError, ModelError
from qlora.export import changes, writing
from qlora.export.changes import requantize
from qlora.export.merge import Merged
from qlora.export.writing import SHARD_BYTES, write
from qlora.model.adapters import attach, load_adapter
from qlora.model.load import load_base
from qlora.model.nf4 import FourBit, dequantize, quantize
from qlora.model.source import INDEX, open_source
from qlora.recipe import dump_recipe
from tests import disk_faults
from tests.model.test_tiles import LiveBytes

CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None] % 100


@pytest.fixture
def adapted(recipe, tmp_path):
    """adapted(base, **lora section) -> a recipe and the directory of an adapter whose every weight is random."""

    def make(base, method="qlora", **lora):
        config = recipe(base, method, lora=lora)
        model = attach(load_base(config, open_source(config.model), CPU).model, config.lora, seed=0)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                spread = 0.02 if "modules_to_save" in name else 0.1
                parameter.data += torch.randn_like(parameter) * spread
        place = tmp_path / "adapter"
        model.save_pretrained(place, save_embedding_layers=False)
        return config, place

    return make


def merged(config, adapter, weights):
    return Merged(adapter, open_source(config.model), config, weights)


def written(config, adapter, weights, out, shard_bytes=SHARD_BYTES):
    write(merged(config, adapter, weights), out, lambda directory: None, shard_bytes)
    return out


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def plain(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def live(config, adapter, method):
    config = config.model_copy(update={"method": method})
    return load_adapter(load_base(config, open_source(config.model), CPU).model, str(adapter))


LORA = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "saved head": {"modules_to_save": ["lm_head"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "biases": {"bias": "all", "target_modules": ["q_proj", "o_proj"]},
}


@pytest.mark.parametrize("weights", ["original", "dequantized"])
@pytest.mark.parametrize("kind", LORA)
def test_transformers_alone_has_the_live_adapters_logits(kind, weights, checkpoint, adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "_PIECE", 1 << 12)  # so that each layer goes in several pieces
    config, adapter = adapted(checkpoint("qwen2"), **LORA[kind])
    found = logits(plain(written(config, adapter, weights, tmp_path / "out")))
    # Sums of fp32 in another order: logits reach about 20.
    expected = {w: logits(live(config, adapter, m)) for w, m in (("original", "lora"), ("dequantized", "qlora"))}
    torch.testing.assert_close(found, expected.pop(weights), atol=2e-4, rtol=1e-4)
    [other] = expected.values()
    assert (found - other).abs().max() > 0.1  # or the two bases could not be told apart


ARCHITECTURES = {
    "gpt2": ("gpt2", "dequantized", {"target_modules": ["c_attn", "c_proj"]}),
    "gpt_neox": ("gpt_neox", "dequantized", {"target_modules": ["query_key_value"]}),
    "gemma2": ("gemma2", "dequantized", {"use_dora": True}),  # its embeddings are tied
    # transformers stacks its experts, which the checkpoint has one by one.
    "mixtral": ("mixtral", "dequantized", {"target_modules": ["q_proj"]}),
    "experts": ("mixtral", "original", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_other_architectures_are_written_under_their_checkpoints_names(case, checkpoint, adapted, tmp_path):
    architecture, weights, lora = ARCHITECTURES[case]
    base, method = checkpoint(architecture), "qlora" if weights == "dequantized" else "lora"
    config, adapter = adapted(base, method, **lora)
    assert sum("experts" in name for name in load_file(adapter / "adapter_model.safetensors")) == 12 * (
        case == "experts"
    )
    out = written(config, adapter, weights, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    torch.testing.assert_close(logits(plain(out)), logits(live(config, adapter, method)), atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}])
def test_tied_embeddings_stay_tied_unless_the_adapter_changed_one(lora, checkpoint, adapted, tmp_path):
    config, adapter = adapted(checkpoint("qwen2", tie_word_embeddings=True), **lora)
    out = written(config, adapter, "dequantized", tmp_path / "out")
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) == bool(lora)
    model = plain(out)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (not lora)
    torch.testing.assert_close(logits(model), logits(live(config, adapter, "qlora")), atol=2e-4, rtol=1e-4)


def test_a_bias_of_the_adapter_is_merged_too(checkpoint, tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(changes, "_PIECE", 1 << 9)
    base = checkpoint("qwen2")
    model = get_peft_model(plain(base), LoraConfig(r=4, lora_bias=True, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    out = written(recipe(base, "lora"), tmp_path / "adapter", "original", tmp_path / "out")
    torch.testing.assert_close(logits(plain(out)), logits(model), atol=2e-4, rtol=1e-4)


def as_gguf(base: Path, path: Path) -> Path:
    """A tiny llama as llama.cpp has it: names of its own, and rows of queries and keys in another order."""
    model = plain(base)
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("weights", ["original", "dequantized"])
def test_a_gguf_base_is_merged_into_a_model_for_transformers(weights, checkpoint, adapted, tmp_path):
    config, adapter = adapted(as_gguf(checkpoint("llama"), tmp_path / "base.gguf"))
    out = written(config, adapter, weights, tmp_path / "out")
    method = "lora" if weights == "original" else "qlora"
    torch.testing.assert_close(logits(plain(out)), logits(live(config, adapter, method)), atol=2e-4, rtol=1e-4)


def test_peft_merges_to_the_same_weights_in_sixteen_bits(checkpoint, adapted, tmp_path):
    config, adapter = adapted(checkpoint("llama"))
    half = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    out = load_file(written(half, adapter, "original", tmp_path / "out") / "model.safetensors")
    # From the weights in bf16, merged in fp32, and rounded once.
    base = AutoModelForCausalLM.from_pretrained(config.model.model_name_or_path, dtype=torch.bfloat16).float()
    theirs = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    assert out.keys() == theirs.keys()
    for name, tensor in out.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, theirs[name].bfloat16(), atol=0, rtol=2**-7, msg=name)  # a bit, at borders


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_quantized_in_pieces_is_bit_for_bit_that_of_training(double, dtype, monkeypatch):
    four_bit = FourBit("nf4", double, dtype)
    dense = torch.randn(300, 448, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = dequantize(quantize(dense, four_bit), dense.shape, four_bit)
    monkeypatch.setattr(changes, "_PIECE", 64 * 256)
    assert torch.equal(requantize(dense, four_bit, CPU), expected)


def test_shards_and_their_index_hold_what_one_file_does(checkpoint, adapted, tmp_path):
    config, adapter = adapted(checkpoint("llama"))
    one = load_file(written(config, adapter, "original", tmp_path / "one") / "model.safetensors")
    out = written(config, adapter, "original", tmp_path / "many", shard_bytes=100_000)
    index = json.loads((out / INDEX).read_text())
    found = {name: safe_open(out / file, "pt").get_tensor(name) for name, file in index["weight_map"].items()}
    assert len(set(index["weight_map"].values())) > 3
    assert found.keys() == one.keys() and all(torch.equal(found[name], one[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert torch.equal(logits(plain(out)), logits(plain(tmp_path / "one")))
    assert durable.verify(out).keys() >= {INDEX, "config.json", *index["weight_map"].values()}


# --- cut short


def contents(directory):
    durable.verify(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != durable.MANIFEST}


def test_whole_shards_of_a_merge_that_was_cut_short_are_kept_and_damaged_ones_made_again(
    checkpoint, adapted, tmp_path, monkeypatch
):
    config, adapter = adapted(checkpoint("llama"))
    expected = contents(written(config, adapter, "original", tmp_path / "whole", 100_000))
    made = []

    def counted(self, name, real=Merged.tensor):
        made.append(name)
        if len(made) == stop:
            raise KeyboardInterrupt
        return real(self, name)

    monkeypatch.setattr(Merged, "tensor", counted)
    stop = 20
    with pytest.raises(KeyboardInterrupt):
        written(config, adapter, "original", tmp_path / "out", 100_000)
    assert not (tmp_path / "out").exists()
    [work] = tmp_path.glob(".out.*.unfinished")
    shards = sorted((work / "model").glob("*-of-*"))
    progress = json.loads((work / "progress.json").read_text())["shards"]
    assert len(progress) >= 2
    damaged = work / "model" / next(iter(progress))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    kept = {name for name in progress if name != damaged.name}
    made.clear()
    stop = 0
    written(config, adapter, "original", tmp_path / "out", 100_000)
    assert contents(tmp_path / "out") == expected
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert {index[name] for name in made} == set(index.values()) - kept and shards
    assert not list(tmp_path.glob(".*.unfinished"))


def test_what_is_left_of_another_merge_is_not_taken(checkpoint, adapted, tmp_path, monkeypatch):
    config, adapter = adapted(checkpoint("llama"))
    expected = contents(written(config, adapter, "dequantized", tmp_path / "whole", 100_000))
    monkeypatch.setattr(writing, "_put_in_place", lambda made, out: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        written(config, adapter, "original", tmp_path / "out", 100_000)
    monkeypatch.undo()
    assert list(tmp_path.glob(".out.*.unfinished"))
    assert contents(written(config, adapter, "dequantized", tmp_path / "out", 100_000)) == expected


# --- memory


def test_one_tensor_stands_at_a_time_and_a_quarter_of_it(checkpoint, adapted, monkeypatch):
    monkeypatch.setattr(changes, "_PIECE", 1 << 14)
    lora = {"target_modules": ["up_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    config, adapter = adapted(checkpoint("llama", intermediate_size=4096), **lora)
    made = merged(config, adapter, "dequantized")
    largest = max(map(made.nbytes_of, made))
    with LiveBytes() as memory:
        for name in made:
            made.tensor(name)
    # Beside it: its codes, an eighth of fp32, its blocks' maxima, and pieces of 64 KiB with what is computed from them.
    assert largest < memory.peak < 1.25 * largest + 10 * 4 * changes._PIECE


def test_of_stacked_experts_that_stay_as_they_are_one_is_read_at_a_time(checkpoint, adapted):
    config, adapter = adapted(checkpoint("mixtral"), "lora", target_modules=["q_proj"])
    made = merged(config, adapter, "original")
    assert any(len(names) > 1 for names in made.together)
    for name in made:
        made.tensor(name)
        assert not made._held


SCRIPT = """
import re, sys
from pathlib import Path
from qlora.export.merge import Merged
from qlora.export.writing import write
from qlora.model.source import open_source
from qlora.recipe import load_recipe

def mebibytes(what):  # not ru_maxrss: a new process inherits in it what its parent held when it called exec
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

recipe, adapter, out = sys.argv[1:]
config, before = load_recipe(recipe), mebibytes("VmRSS")
write(Merged(Path(adapter), open_source(config.model), config, "dequantized"), Path(out), lambda directory: None)
print("mebibytes", before, mebibytes("VmHWM"))
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figures")
def test_host_memory_is_the_largest_tensor_and_at_most_a_gigabyte(tmp_path, recipe):
    """A model of 2 GB, in bf16."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shape = LlamaConfig(
        hidden_size=4096, intermediate_size=16384, num_hidden_layers=3, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    state = {n: torch.randn(p.shape, dtype=torch.bfloat16) for n, p in empty.named_parameters()}
    assert 1.7e9 < sum(t.nbytes for t in state.values()) < 2.3e9
    base.mkdir()
    save_file(state, base / "model.safetensors", {"format": "pt"})
    shape.save_pretrained(base)
    largest = max(tensor.nbytes for tensor in state.values()) / 2**20
    del state
    model = get_peft_model(empty, LoraConfig(r=16, target_modules="all-linear"), low_cpu_mem_usage=True)
    adapter.mkdir()
    weights = {n: torch.full(t.shape, 0.01) for n, t in get_peft_model_state_dict(model).items()}
    save_file(weights, adapter / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(adapter)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(base, model={"dtype": "bfloat16"})))
    command = [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in ("recipe.yaml", "adapter", "out"))]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    before, peak = map(float, process.stdout.split("mebibytes")[1].split())
    print(f"peak {peak:.0f} MiB, {before:.0f} of them before; the largest tensor has {largest:.0f}")
    # The libraries' own memory is some 400 MiB here, and more where torch is built for GPUs: a gigabyte with it.
    assert peak - before < largest + 600


# --- bad input


def test_an_adapter_of_another_base_is_refused_with_names_and_shapes(checkpoint, adapted, tmp_path, recipe):
    _, adapter = adapted(checkpoint("llama"))
    for other in (checkpoint("llama", intermediate_size=96), checkpoint("llama", num_hidden_layers=2)):
        with pytest.raises(AdapterError, match=r"trained on another base, or is not whole:\n.*layers"):
            merged(recipe(other), adapter, "original")


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_lose(path):
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, path)


def damage_nan(path):
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = float("nan")
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [(damage_truncate, "truncated"), (damage_lose, "is missing"), (damage_nan, "not finite"), (Path.unlink, "has no")],
)
def test_a_damaged_adapter_is_refused_and_leaves_nothing(damage, said, checkpoint, adapted, tmp_path):
    config, adapter = adapted(checkpoint("llama"))
    damage(adapter / "adapter_model.safetensors")
    before = set(tmp_path.iterdir())
    with pytest.raises(AdapterError, match=said):
        written(config, adapter, "original", tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_an_adapter_that_began_in_the_base_is_refused(checkpoint, adapted):
    config, adapter = adapted(checkpoint("llama"), init_lora_weights="pissa")
    with pytest.raises(AdapterError, match="pissa"):
        merged(config, adapter, "original")


def test_a_base_that_is_not_whole_is_refused(checkpoint, adapted, tmp_path):
    shutil.copytree(checkpoint("llama"), tmp_path / "base")
    config, adapter = adapted(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        merged(config, adapter, "original")


def test_a_disk_with_too_little_room_is_told_before_anything_is_written(checkpoint, adapted, tmp_path, monkeypatch):
    config, adapter = adapted(checkpoint("llama"))
    monkeypatch.setattr(durable, "free_disk_bytes", lambda path: 3 << 20)
    with pytest.raises(MachineError, match=r"needs 6\d\.\d MiB of disk, 3\.0 MiB are free"):
        written(config, adapter, "original", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_disk_that_fills_up_meanwhile_is_said_and_whole_shards_are_kept(checkpoint, adapted, tmp_path, monkeypatch):
    config, adapter = adapted(checkpoint("llama"))
    room = 250_000

    def full(self, content, real=durable.Writer.write):
        nonlocal room
        room -= len(memoryview(content).cast("B"))
        if room < 0:
            raise OSError(28, "No space left on device")
        real(self, content)

    monkeypatch.setattr(durable.Writer, "write", full)
    with pytest.raises(MachineError, match=r"No space left on device(.|\n)*whole shards are kept"):
        written(config, adapter, "original", tmp_path / "out", 100_000)
    monkeypatch.undo()
    assert list(tmp_path.glob(".out.*/model/*.safetensors"))
    assert torch.isfinite(logits(plain(written(config, adapter, "original", tmp_path / "out", 100_000)))).all()


def test_a_disk_that_is_full_from_the_start_is_promised_no_shards(checkpoint, adapted, tmp_path, monkeypatch):
    config, adapter = adapted(checkpoint("llama"))
    monkeypatch.setattr(durable.Writer, "write", lambda *_: disk_faults.full())
    with pytest.raises(MachineError, match=r"No space left on device.*\n  give --out a directory on a disk with more"):
        written(config, adapter, "original", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_merge_waits_for_another_that_ends_and_takes_its_place_away(checkpoint, adapted, tmp_path, monkeypatch):
    config, adapter = adapted(checkpoint("llama"))
    ended = []

    def lock(work, real=writing.Lock):
        if not ended:
            ended.append(work.rmdir())
        return real(work)

    monkeypatch.setattr(writing, "Lock", lock)
    assert torch.isfinite(logits(plain(written(config, adapter, "original", tmp_path / "out")))).all()
    assert ended


def test_somebody_elses_directory_is_not_replaced_and_an_earlier_merge_is(checkpoint, adapted, tmp_path):
    config, adapter = adapted(checkpoint("llama"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match="something else"):
        written(config, adapter, "original", out)
    (out / "notes.txt").unlink()
    first = contents(written(config, adapter, "original", out))
    second = contents(written(config, adapter, "dequantized", out))
    assert first["model.safetensors"] != second["model.safetensors"]
    assert not list(tmp_path.glob(".*.unfinished"))
