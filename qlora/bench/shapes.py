"""Base models of random weights at exact shapes, for models whose 16-bit files are not at hand.

What a step costs depends on the shapes of the weights, not on their values. So they are drawn: each by a generator of
its own, seeded with its name, on the device that it goes to, when the loader asks for it. The same weights come out
whoever asks, so that methods can be compared on them.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora.bench.work import short
from qlora.errors import ModelError
from qlora.model.source import Source

STD = 0.02  # of the weights, as transformers draws them

_IN_WHEEL = Path(__file__).parent / "_shapes"
HOME = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).parents[2] / "benchmarks" / "shapes"

_FAMILY_AND_SIZE = re.compile(r"(?P<family>[a-z]+)-?(?P<version>[\d.]*)-(?P<size>\d[\d.x]*[bm])(?:-.*)?")


def known() -> list[str]:
    """The names of the shapes that come with the benchmark."""
    return sorted(path.stem for path in HOME.glob("*.json"))


def shape_of(name: str) -> dict[str, Any]:
    """What the config.json of a shape says.

    name  of a shape, its beginning, or family and size (`llama-8b`), where only one shape fits; or the path of a
          config.json, or of the directory that has one

    Raises ModelError, which lists the shapes.
    """
    path = _place(name)
    try:
        facts = json.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}{_choices()}") from None
    except ValueError as error:
        raise ModelError(f"{path}: is no JSON: {error}{_choices()}") from None
    if not isinstance(facts, dict) or "model_type" not in facts:
        raise ModelError(f"{path}: is no config.json of a model: it has no `model_type`{_choices()}")
    return facts


def random_source(name: str, home: Path, device: torch.device, seed: int) -> Source:
    """A source that draws the weights of a shape on `device`.

    home  where it gets a directory of its own, with the two small files from which config and cache know it: the
          shape, and how it is drawn
    """
    drawn = {"seed": seed, "std": STD, "device": device.type, "torch": torch.__version__}
    texts = {"config.json": json.dumps(shape_of(name), indent=1), "drawn.json": json.dumps(drawn, indent=1)}
    directory = home / "random" / f"{short(name)}-{zlib.crc32(''.join(texts.values()).encode()):08x}"
    directory.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        path = directory / file
        if not path.is_file() or path.read_text() != text:
            partial = path.with_name(f".{file}.{os.getpid()}")  # another method's process may be reading the file
            partial.write_text(text)
            partial.replace(path)
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


def _place(name: str) -> Path:
    """Where a shape's config.json is."""
    path, names = Path(name).expanduser(), known()
    if name in names:
        return HOME / f"{name}.json"
    if path.suffix == ".json":
        return path
    if path.is_dir():
        return path / "config.json"
    fitting = [each for each in names if each.startswith(name.lower()) or _agree(name.lower(), each)]
    if len(fitting) == 1:
        return HOME / f"{fitting[0]}.json"
    raise ModelError(f"{name}: {f'fits {len(fitting)} shapes' if fitting else 'no such shape'}{_choices(fitting)}")


def _agree(asked: str, name: str) -> bool:
    """Whether family and size are the same, and so much of the version as is said."""
    a, b = _FAMILY_AND_SIZE.fullmatch(asked), _FAMILY_AND_SIZE.fullmatch(name)
    if a is None or b is None:
        return False
    return (a["family"], a["size"]) == (b["family"], b["size"]) and b["version"].startswith(a["version"])


def _choices(names: list[str] | None = None) -> str:
    return f"\n  shapes: {', '.join(names or known())}; or the path of a config.json"
