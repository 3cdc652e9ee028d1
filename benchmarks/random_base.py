"""A base model of random weights at an exact shape, for models whose 16-bit files are not at hand.

What a step costs depends on the shapes of the weights, not on their values. So they are drawn: each by a generator of
its own, seeded with its name, on the device that it goes to, when the loader asks for it. The rest (NF4, tiers, cache)
is `load_base` as it is.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora.model.source import Source

STD = 0.02  # of the weights, as transformers draws them

SHAPES = Path(__file__).parent / "shapes"
# For two CPU cores: 302M parameters in its layers, 149 MiB in NF4.
MID: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shape_of(name: str) -> dict[str, Any]:
    """What config.json says: `mid`, the name of a file in SHAPES, or the path of one."""
    if name == "mid":
        return MID
    known = SHAPES / f"{name}.json"
    return json.loads((known if known.is_file() else Path(name)).read_text())


def label(name: str) -> str:
    """A shape's name without its place."""
    return Path(name).name.removesuffix(".json")


def random_source(name: str, home: Path, device: torch.device, seed: int) -> Source:
    """A source that draws the weights of a shape on `device`.

    home  where it gets a directory of its own, with the two small files from which config and cache know it: the
          shape, and how it is drawn
    """
    drawn = {"seed": seed, "std": STD, "device": device.type, "torch": torch.__version__}
    texts = {"config.json": json.dumps(shape_of(name), indent=1), "drawn.json": json.dumps(drawn, indent=1)}
    directory = home / "random" / f"{label(name)}-{zlib.crc32(''.join(texts.values()).encode()):08x}"
    directory.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        if not (path := directory / file).is_file() or path.read_text() != text:
            path.write_text(text)
    return RandomSource(name, directory, None, tuple(directory / file for file in texts), None, device, seed)


@dataclass(frozen=True, slots=True)
class RandomSource(Source):
    """A checkpoint that is not on a disk. Its `files` say all that its weights follow from."""

    device: torch.device
    seed: int

    def tensors(self, skeleton: PreTrainedModel) -> Mapping[str, Any]:
        return {
            parameter_name: DrawnTensor(parameter_name, parameter.shape, parameter.dtype, self.device, self.seed)
            for parameter_name, parameter in skeleton.named_parameters()
        }


@dataclass(frozen=True, slots=True)
class DrawnTensor:
    """One tensor, drawn when sliced: the same each time. Norms are ones and biases zeros, or no signal would pass."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    seed: int

    def __getitem__(self, index: Any) -> torch.Tensor:
        if len(self.shape) < 2:
            fill = torch.ones if self.name.endswith("weight") else torch.zeros
            return fill(self.shape, dtype=self.dtype, device=self.device)[index]
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.seed} {self.name}".encode()))
        drawn = torch.randn(self.shape, generator=generator, dtype=self.dtype, device=self.device)
        return drawn.mul_(STD)[index]
