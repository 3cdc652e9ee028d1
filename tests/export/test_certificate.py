"""The certificate says the truth about a merged model, and what is not true to its adapter is not given out."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.config import ModelConfig
from qlora.errors import AdapterError, MachineError
from qlora.export import certificate as certificates
from qlora.export.certificate import CERTIFICATE, Certificate, Fidelity, export_merged
from qlora.model.adapters import attach, load_adapter
from qlora.model.batch import IGNORE_INDEX, Batch
from qlora.model.load import load_base
from qlora.model.source import open_source
from tests import tiny
from tests.conftest import random_batch

CPU = torch.device("cpu")


def padded() -> Batch:
    """Two rows of which the second is shorter."""
    batch = random_batch(2, 12, seed=5)
    mask = torch.ones_like(batch.input_ids)
    mask[1, 7:] = 0
    labels = batch.labels.masked_fill(mask == 0, IGNORE_INDEX)
    return Batch(batch.input_ids, batch.position_ids, labels, mask, batch.rows)


BATCHES = [random_batch(3, 12, seed=1), padded(), random_batch(1, 20, seed=2)]


@pytest.fixture
def adapted(checkpoint, recipe, tmp_path):
    """adapted(method) -> what `export_merged` takes of an adapter whose weights are random."""

    def make(method="qlora", **changes):
        config = recipe(tiny.chat_model(checkpoint, "qwen2"), method)
        source = open_source(config.model)
        model = attach(load_base(config, source, CPU).model, config.lora, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        given = {"config": config, "source": source, "tokenizer": source.tokenizer()}
        return given | {"batches": BATCHES, "device": CPU} | changes

    return make


def predictions(model):
    """Log-probabilities and targets of every supervised token, in one piece each row."""
    found = []
    for batch in BATCHES:
        for row in range(len(batch.labels)):
            length = len(batch.labels[row]) if batch.attention_mask is None else int(batch.attention_mask[row].sum())
            with torch.no_grad():
                logits = model.eval()(input_ids=batch.input_ids[row : row + 1, :length]).logits[0]
            wanted = batch.labels[row, 1:length]
            there = wanted != IGNORE_INDEX
            found.append((logits[:-1][there].float().log_softmax(1), wanted[there]))
    return torch.cat([p for p, _ in found]), torch.cat([t for _, t in found])


def fidelity(live, model):
    p, targets = predictions(live)
    q, _ = predictions(model)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    same = (p.argmax(1) == q.argmax(1)).float().mean().item()
    return Fidelity(kl, same, torch.nn.functional.nll_loss(q, targets).item())


@pytest.mark.parametrize("room", [1 << 26, 500])  # all logits at once; a token's at a time
def test_the_figures_are_those_of_the_written_model_beside_the_live_adapter(room, adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(certificates, "_LOGITS", room)
    given = adapted()
    found = {}
    for weights in ("original", "dequantized"):
        out = tmp_path / weights
        found[weights] = export_merged(tmp_path / "adapter", out, **given, weights=weights, force=True)
    live = load_adapter(load_base(given["config"], given["source"], CPU).model, str(tmp_path / "adapter"))
    for weights, certificate in found.items():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / weights, dtype=torch.float32)
        expected = fidelity(live, model)
        # Other kernels for padded rows and single tokens, in fp32.
        assert dataclasses.astuple(certificate.candidates[weights]) == pytest.approx(
            dataclasses.astuple(expected), rel=1e-3, abs=1e-6
        )
        p, targets = predictions(live)
        assert certificate.live_loss == pytest.approx(torch.nn.functional.nll_loss(p, targets).item(), rel=1e-4)
        assert certificate.tokens == len(targets) and certificate.rows == 6
    with live.disable_adapter():
        p, targets = predictions(live)
    assert found["original"].base_loss == pytest.approx(torch.nn.functional.nll_loss(p, targets).item(), rel=1e-4)
    assert found["dequantized"].candidates["dequantized"].kl < 1e-5 < found["original"].candidates["original"].kl


def test_the_better_one_is_written_with_its_certificate_and_tokenizer(adapted, tmp_path):
    given, said = adapted(), []
    certificate = export_merged(tmp_path / "adapter", tmp_path / "out", **given, say=said.append)
    assert certificate.written == certificate.better == "dequantized" and certificate.passes
    there = json.loads((tmp_path / "out" / CERTIFICATE).read_text())
    assert there["candidates"]["original"]["kl"] == certificate.candidates["original"].kl > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert certificate.block() in card and "library_name: transformers" in card
    assert any(certificate.verdict() in " ".join(line.split()) for line in said)
    assert all(len(line) <= 100 for text in said for line in text.splitlines())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == given["tokenizer"].chat_template


def test_a_merge_that_is_not_true_to_its_adapter_is_refused_unless_forced(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(certificates, "MOST_KL", 1e-4)
    given = adapted()
    with pytest.raises(AdapterError, match=r"not the model that was trained\n  KL .*\n  --force"):
        export_merged(tmp_path / "adapter", tmp_path / "out", **given, weights="original")
    assert not (tmp_path / "out").exists()
    forced = export_merged(tmp_path / "adapter", tmp_path / "out", **given, weights="original", force=True)
    assert not forced.passes and "**Forced**" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_on_sixteen_bits_has_one_candidate(adapted, tmp_path):
    given = adapted("lora")
    certificate = export_merged(tmp_path / "adapter", tmp_path / "out", **given)
    assert list(certificate.candidates) == ["original"] and certificate.candidates["original"].kl < 1e-5
    with pytest.raises(AdapterError, match="none to dequantize"):
        export_merged(tmp_path / "adapter", tmp_path / "out", **given, weights="dequantized")


@pytest.mark.parametrize("lack", ["rows", "memory"])
def test_what_cannot_be_measured_is_refused_unless_forced(lack, adapted, tmp_path, monkeypatch):
    given = adapted(**({"batches": []} if lack == "rows" else {}))
    if lack == "memory":
        monkeypatch.setattr(certificates, "free_bytes", lambda device: 1 << 10)
    with pytest.raises((AdapterError, MachineError), match="no held-out rows" if lack == "rows" else "are free"):
        export_merged(tmp_path / "adapter", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    certificate = export_merged(tmp_path / "adapter", tmp_path / "out", **given, force=True)
    assert certificate.written == "dequantized" and certificate.tokens == 0 and not certificate.passes
    assert "is not known" in (tmp_path / "out" / "README.md").read_text()


def test_a_broken_adapter_is_refused_even_if_forced(adapted, tmp_path):
    given = adapted()
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(AdapterError, match="truncated"):
        export_merged(tmp_path / "adapter", tmp_path / "out", **given, force=True)


def test_an_adapter_of_another_base_is_refused_even_if_forced_before_anything_is_written(adapted, checkpoint, tmp_path):
    given = adapted()
    other = open_source(ModelConfig(model_name_or_path=str(tiny.chat_model(checkpoint, "qwen2", intermediate_size=96))))
    before = set(tmp_path.iterdir())
    with pytest.raises(AdapterError, match=r"was trained on another base, or is not whole:\n.*mlp.* has \["):
        export_merged(tmp_path / "adapter", tmp_path / "out", **given | {"source": other}, force=True)
    assert set(tmp_path.iterdir()) == before


def test_the_verdict_says_which_is_better_and_by_how_much():
    found = {"original": Fidelity(0.02, 0.99, 1.0), "dequantized": Fidelity(0.04, 0.98, 1.1)}
    certificate = Certificate(2, 10, 1.0, 2.0, found, "original")
    assert certificate.better == "original"
    assert "original 16-bit weights, with a KL of 0.02 nats a token, 2 times less" in certificate.verdict()
    found = {"original": Fidelity(0.02, 0.99, 1.0), "dequantized": Fidelity(-1.7e-8, 1.0, 1.1)}  # of fp32's rounding
    verdict = Certificate(2, 10, 1.0, 2.0, found, "dequantized").verdict()
    assert "with a KL of less than 1e-06 nats a token; into the base's original 16-bit weights it is 0.02." in verdict
    assert json.loads(certificate.to_json())["better"] == "original"
