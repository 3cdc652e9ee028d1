"""Tiny models of many architectures, made on the spot from their configurations."""

import signal

import pytest
import torch
from hypothesis import settings
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from qlora.config import Config
from qlora.model.batch import IGNORE_INDEX, Batch

torch.set_num_threads(1)  # threads cost more than they bring at these sizes
disable_progress_bar()  # or what a test reads from stderr depends on which test made a model first


def pytest_addoption(parser):
    parser.addoption("--torture", action="store_true", help="tests marked `torture` do all they can, not a sample")


def pytest_configure(config):
    settings.register_profile("sample", deadline=None)  # other tests run beside them
    settings.register_profile("torture", max_examples=10_000, deadline=None)
    settings.load_profile("torture" if config.getoption("--torture") else "sample")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so a shell without job control starts what runs behind it
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def times(pytestconfig):
    """times(sample, all) -> how often a test that is marked `torture` does its work."""
    return lambda sample, everything: everything if pytestconfig.getoption("--torture") else sample


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 16},
    "mistral": SMALL | {"sliding_window": 8},
    "gemma2": SMALL | {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": SMALL | {"head_dim": 16, "sliding_window": 8},
    "phi3": SMALL,
    "olmo2": SMALL,
    "gpt_neox": SMALL,
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128, "n_positions": 64, "eos_token_id": 2}
    | {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,  # the standard order has no seeds to draw the same masks
    },
    "mixtral": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny_config(architecture: str, **changes):
    return AutoConfig.for_model(architecture, **(ARCHITECTURES[architecture] | changes))


@pytest.fixture(scope="session", autouse=True)
def caches_of_its_own(tmp_path_factory):
    """What tests quantize does not go where the user's models are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(architecture, **config changes) -> a directory with a tiny random model, made once."""
    made = {}

    def make(architecture: str, **changes):
        key = (architecture, *sorted(changes.items()))
        if key not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=torch.float32)
            path = tmp_path_factory.mktemp(architecture)
            # PyTorch's small default weights make a model whose logits hardly differ; larger ones let mistakes show.
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(path)
            made[key] = path
        return made[key]

    return make


@pytest.fixture
def recipe():
    """recipe(directory, section=dict(...)) -> a Config for a tiny model in fp32."""

    def make(path, method="qlora", **sections):
        model = {"model_name_or_path": str(path), "dtype": "float32"} | sections.pop("model", {})
        return Config.model_validate(
            {
                "method": method,
                "model": model,
                "quantization": {"bnb_4bit_compute_dtype": model["dtype"]},
                "lora": {"r": 4, "lora_alpha": 8} | sections.pop("lora", {}),
                "data": {"datasets": [{"path": "unused.jsonl"}]} | sections.pop("data", {}),
                "memory": {"plan": False} | sections.pop("memory", {}),
            }
            | sections
        )

    return make


def random_batch(rows: int = 1, tokens: int = 12, vocab: int = 128, seed: int = 0, supervised: float = 0.6) -> Batch:
    """Unpadded rows of random tokens of which a part is supervised."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (rows, tokens), generator=g)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=g) > supervised, IGNORE_INDEX)
    labels[:, 0] = IGNORE_INDEX
    labels[:, -1] = ids[:, -1]
    return Batch(ids, torch.arange(tokens).repeat(rows, 1), labels, None, tuple(f"row{seed}.{i}" for i in range(rows)))
