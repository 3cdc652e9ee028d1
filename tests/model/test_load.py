"""Loading: quantized as it streams in, one tensor on the host at a time, and a clear word about broken files."""

import json
import re
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.errors import ModelError
from qlora.model.load import load_base
from qlora.model.nf4 import FourBit, FourBitWeight, four_bit_weights
from qlora.model.source import SafetensorsTensor, open_source
from tests.conftest import random_batch

CPU = torch.device("cpu")


def loaded(config):
    return load_base(config, open_source(config.model), CPU)


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of a tiny checkpoint in two shards, to be damaged."""
    path = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(checkpoint("llama")).save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def test_linear_layers_are_in_four_bits_and_the_rest_is_as_it_was(checkpoint, recipe):
    path = checkpoint("llama")
    base = loaded(recipe(path))
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, theirs in stock.named_modules():
        if isinstance(theirs, torch.nn.Linear) and name != "lm_head":
            expected = FourBitWeight.quantized(theirs.weight.data, FourBit(compute_dtype=torch.float32)).expand()
            assert torch.equal(base.model.get_submodule(name).weight, expected), name
    for name, parameter in stock.named_parameters():
        if "norm" in name or "embed" in name or "lm_head" in name:
            assert torch.equal(base.model.get_parameter(name), parameter), name
    in_four_bits = sum(p.numel() for name, p in stock.named_parameters() if "proj" in name)
    assert base.parameters == sum(p.numel() for p in stock.parameters())
    assert base.four_bit_share == in_four_bits / base.parameters
    assert not any(p.requires_grad for p in base.model.parameters())


def test_experts_are_in_four_bits_too(checkpoint, recipe):
    base = loaded(recipe(checkpoint("mixtral")))
    assert base.four_bit_share > 0.8
    assert base.model.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 256, 64)


def test_method_lora_keeps_sixteen_bits_and_method_full_trains_them(checkpoint, recipe):
    path, batch = checkpoint("llama"), random_batch()
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for method in ("lora", "full"):
        base = loaded(recipe(path, method))
        assert torch.equal(base.model(input_ids=batch.input_ids).logits, stock(input_ids=batch.input_ids).logits)
        assert base.four_bit_share == 0
        assert all(p.requires_grad == (method == "full") for p in base.model.parameters())


def test_shards_load_like_one_file(broken, checkpoint, recipe):
    batch = random_batch()
    whole, sharded = (loaded(recipe(path)).model for path in (checkpoint("llama"), broken))
    assert torch.equal(whole(input_ids=batch.input_ids).logits, sharded(input_ids=batch.input_ids).logits)


def test_one_dense_weight_stands_at_a_time(broken, recipe, monkeypatch):
    """Host memory while loading: of the tensors that end in four bits, never two in their 16-bit form."""
    alive, most = [], 0
    read = SafetensorsTensor.__getitem__

    def watched(self, index):
        nonlocal most
        tensor = read(self, index)
        if "proj" in self.name:
            alive.append(weakref.ref(tensor.untyped_storage()))
            most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(SafetensorsTensor, "__getitem__", watched)
    base = loaded(recipe(broken))
    assert len(alive) == len(four_bit_weights(base.model)) == 21
    assert most == 1
    assert not any(ref() is not None for ref in alive)


def test_a_truncated_shard_is_named(broken, recipe):
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{re.escape(str(shard))}: truncated"):
        loaded(recipe(broken))


def test_a_missing_shard_is_named(broken, recipe):
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"shards are missing: {re.escape(shard.name)}"):
        loaded(recipe(broken))


def test_a_tensor_that_no_shard_holds_is_named(broken, recipe):
    shard = next(p for p in broken.glob("*.safetensors") if any("down_proj" in key for key in load_file(p)))
    tensors = load_file(shard)
    gone = next(name for name in tensors if "down_proj" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, shard)
    with pytest.raises(ModelError, match=re.escape(gone)):
        loaded(recipe(broken))


def test_an_index_cannot_name_files_outside_its_directory(broken, recipe):
    index = broken / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="outside its directory"):
        loaded(recipe(broken))


def test_weights_of_another_shape_are_named(broken, recipe):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(ModelError, match=r"do not fit its configuration:\n.*_proj.weight is \[\d+, \d+\], the"):
        loaded(recipe(broken))


def test_a_missing_tensor_in_a_single_file_is_named(checkpoint, tmp_path, recipe):
    path = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"missing_keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        loaded(recipe(path))


def test_pickled_weights_are_refused(checkpoint, tmp_path, recipe):
    path = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights, which can carry code"):
        loaded(recipe(path))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/b/c", "nowhere.gguf"])
def test_a_base_that_is_not_there_is_said(name, recipe):
    with pytest.raises(ModelError, match=re.escape(name)):
        loaded(recipe(name))


def test_a_file_that_only_bears_the_name_gguf_is_said(tmp_path, recipe):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="not a GGUF file"):
        loaded(recipe(path))


@pytest.mark.parametrize("layers_on_host", [None, 0])
@pytest.mark.parametrize("shard", ["model.layers.1.safetensors", "dense.safetensors"])
def test_a_damaged_cache_is_said_and_built_again(shard, layers_on_host, checkpoint, recipe, tmp_path):
    memory = {"nf4_cache_dir": str(tmp_path), "layers_on_device": 1, "layers_on_host": layers_on_host}
    config, ids = recipe(checkpoint("llama"), memory=memory), torch.arange(9)[None]

    def load():
        said = []
        base = load_base(config, open_source(config.model), torch.device("cpu"), said.append)
        with torch.no_grad():
            return base.cached, said, base.model(input_ids=ids).logits

    cached, said, expected = load()
    assert not cached and not said
    [path] = tmp_path.glob(f"nf4/*/{shard}")
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    cached, said, logits = load()
    assert not cached and shard in said[0] and "built again" in said[0]
    assert torch.equal(logits, expected)
    cached, said, logits = load()
    assert cached and not said and torch.equal(logits, expected)
