"""The same claims on a real model: SmolLM2-135M-Instruct from its GGUF file, which `make test` fetches."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from qlora.config import Config, MemoryConfig
from qlora.data.chat import end_token_ids, render_prompt
from qlora.evaluate.generation import answer
from qlora.model.adapters import attach, trainable
from qlora.model.load import load_base
from qlora.model.source import open_source
from qlora.train.step import choose
from tests.conftest import random_batch
from tests.train.test_step import gradients, standard_order

MODEL = Path(__file__).parent.parent / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.exists(), reason="`make test` fetches the model, plain pytest does not"),
]


@pytest.fixture(autouse=True)
def all_threads():
    """A real model is worth more than the one thread of the tiny ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def loaded(method):
    config = Config.model_validate(
        {
            "method": method,
            "model": {"model_name_or_path": str(MODEL)},
            "data": {"datasets": [{"path": "unused.jsonl"}]},
        }
    )
    return config, load_base(config, open_source(config.model), CPU)


def test_our_reading_of_a_gguf_file_is_transformers_own():
    _, base = loaded("lora")
    theirs = AutoModelForCausalLM.from_pretrained(
        MODEL.parent, gguf_file=MODEL.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    ours = dict(base.model.named_parameters())
    assert ours.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours[name], parameter), name


def test_it_loads_in_four_bits_is_cut_and_has_the_gradients_of_the_standard_order():
    config, base = loaded("qlora")
    assert base.parameters == 134_515_008
    assert 0.78 < base.four_bit_share < 0.80
    peft_model = attach(base.model, config.lora, seed=0).train()
    for name, parameter in trainable(peft_model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    memory = MemoryConfig(order="layer-major", micro_batch_tokens=0)
    step = choose(base.model, CPU, memory, 0, ".", print)
    assert step.isolates_documents
    batches = [random_batch(1, 40, vocab=49_152, seed=j) for j in range(3)]
    standard = standard_order(base.model, step.blocks, batches)
    expected = gradients(peft_model)
    assert step(batches).loss == pytest.approx(standard, rel=1e-5)
    found = gradients(peft_model)
    assert len(found) == 30 * 7 * 2
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


def test_it_answers_and_stops():
    _, base = loaded("qlora")
    tokenizer = base.source.tokenizer()
    ids = render_prompt(tokenizer, [{"role": "user", "content": "What is the capital of France? One word."}])
    [text] = answer(base.model, CPU, tokenizer, [ids], end_token_ids(tokenizer), 30, batch_size=1)
    assert "Paris" in text
    assert "<|im_end|>" not in text
