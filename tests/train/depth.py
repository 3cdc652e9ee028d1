"""A process of its own: the peak of its memory over a few steps of a model of so many layers.

usage: python -m tests.train.depth DIRECTORY LAYERS file|device     prints MiB
"""

import re
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.config import Config
from qlora.model.adapters import attach
from qlora.model.load import load_base
from qlora.model.source import open_source
from qlora.train.step import choose
from tests.conftest import random_batch

SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 128}


def checkpoint(directory: Path, layers: int) -> Path:
    """A random model of `layers` layers of 4.2 M parameters, 2.2 MB in four bits each."""
    path = directory / f"layers{layers}"
    if not path.exists():
        LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).to(torch.bfloat16).save_pretrained(path)
    return path


def main(directory: str, layers: str, tier: str) -> None:
    path = checkpoint(Path(directory), int(layers))
    memory = {"nf4_cache_dir": directory, "activations": "file", "order": "layer-major"}
    if tier == "file":
        memory |= {"layers_on_device": 0, "layers_on_host": 0}
    config = Config.model_validate(
        {
            "model": {"model_name_or_path": str(path)},
            "data": {"datasets": [{"path": "unused"}]},
            "lora": {"r": 1, "target_modules": ["q_proj"]},
            "memory": memory,
        }
    )
    cpu = torch.device("cpu")
    base = load_base(config, open_source(config.model), cpu)
    if not base.cached:
        return  # this process has held what quantizing takes; the next one is to be measured
    attach(base.model, config.lora, 0).train()
    step = choose(base.model, cpu, config.memory, 0, directory, print)
    for _ in range(2):
        step([random_batch(1, 64, seed=j) for j in range(2)])
    # Not ru_maxrss: a process inherits in it what its parent held when it began.
    print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
