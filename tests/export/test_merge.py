"""A merged model is the adapter in its base, to the rounding of its dtype, in plain transformers; and whole, or not
there."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora import durable
from qlora.errors import AdapterError, MachineError, ModelError
from qlora.export import merge
from qlora.export.merge import Merged, dequantized, write
from qlora.model.adapters import attach, load_adapter
from qlora.model.load import load_base
from qlora.model.nf4 import FourBit, dequantize, quantize
from qlora.model.source import INDEX, open_source

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


def written(config, adapter, weights, out, shard_bytes=merge.SHARD_BYTES):
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
    monkeypatch.setattr(merge, "_PIECE", 1 << 12)  # so that each layer goes in several pieces
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
    monkeypatch.setattr(merge, "_PIECE", 1 << 9)
    from peft import LoraConfig, get_peft_model

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
    monkeypatch.setattr(merge, "_PIECE", 64 * 256)
    assert torch.equal(dequantized(dense, four_bit, CPU), expected)


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
    monkeypatch.setattr(merge, "_put_in_place", lambda made, out: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        written(config, adapter, "original", tmp_path / "out", 100_000)
    monkeypatch.undo()
    assert list(tmp_path.glob(".out.*.unfinished"))
    assert contents(written(config, adapter, "dequantized", tmp_path / "out", 100_000)) == expected


SCRIPT = """
import sys
from pathlib import Path
from qlora.export.merge import Merged, write
from qlora.model.source import open_source
from qlora.recipe import load_recipe
recipe, adapter, out, shard_bytes = sys.argv[1:]
config = load_recipe(recipe)
merged = Merged(Path(adapter), open_source(config.model), config, "dequantized")
{measure}
write(merged, Path(out), lambda directory: None, int(shard_bytes), lambda text: print(text, flush=True))
{report}
"""


def in_a_process(config, adapter, out, shard_bytes, measure="", report=""):
    from qlora.recipe import dump_recipe

    recipe = out.with_name("recipe.yaml")
    recipe.write_text(dump_recipe(config))
    script = SCRIPT.format(measure=measure, report=report)
    command = [sys.executable, "-c", script, str(recipe), str(adapter), str(out), str(shard_bytes)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.torture
def test_a_merge_that_is_killed_leaves_nothing_believed_and_the_next_one_finishes(checkpoint, adapted, tmp_path, times):
    config, adapter = adapted(checkpoint("llama"))
    expected = contents(written(config, adapter, "dequantized", tmp_path / "whole", 20_000))
    draw, killed = random.Random(0), 0
    for k in range(times(2, 20)):
        out = tmp_path / f"out{k}"
        process = in_a_process(config, adapter, out, 20_000)
        assert process.stdout is not None
        process.stdout.readline()  # the first shard is whole
        time.sleep(draw.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if out.exists():
            durable.verify(out)
        assert contents(written(config, adapter, "dequantized", out, 20_000)) == expected
        assert not list(tmp_path.glob(f".out{k}.*"))
    assert killed


@pytest.mark.exhaustive
def test_host_memory_is_the_largest_tensor_and_at_most_a_gigabyte(tmp_path, recipe):
    """A model of 2 GB, in bf16."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig

    shape = LlamaConfig(
        hidden_size=4096, intermediate_size=16384, num_hidden_layers=3, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    state = {n: torch.full(p.shape, 0.01, dtype=torch.bfloat16) for n, p in empty.named_parameters()}
    assert 1.7e9 < sum(t.nbytes for t in state.values()) < 2.3e9
    base.mkdir()
    save_file(state, base / "model.safetensors", {"format": "pt"})
    shape.save_pretrained(base)
    largest = max(tensor.nbytes for tensor in state.values())
    del state
    model = get_peft_model(empty, LoraConfig(r=16, target_modules="all-linear"), low_cpu_mem_usage=True)
    from peft import get_peft_model_state_dict

    adapter.mkdir()
    weights = {n: torch.full(t.shape, 0.01) for n, t in get_peft_model_state_dict(model).items()}
    save_file(weights, adapter / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(adapter)
    config = recipe(base, model={"dtype": "bfloat16"})
    measure = (
        "import resource; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; before = peak()"
    )
    process = in_a_process(config, adapter, tmp_path / "out", 5 * 10**9, measure, "print('used', peak() - before)")
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    used = int(out.split("used")[1])
    assert used < largest + 2**30, f"{used / 2**20:.0f} MiB, the largest tensor has {largest / 2**20:.0f}"


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
