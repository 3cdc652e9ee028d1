"""What is measured: suites, and the setups and works that they stand for.

    suite (YAML, flags) --setups()--> one process each: a method on a model, under a cap of memory
                        --works------> what each process does: k micro-batches of [rows, tokens] a step

A suite is data; `benchmarks/suites/` has ours, and any path of a YAML file is one too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field

from qlora.config import Optim
from qlora.section import Contradiction, Section

Method = Literal["qlora", "lora", "full", "hf-qlora", "hf-lora", "unsloth", "torchtune", "llama-factory"]
OURS = ("qlora", "lora", "full")
STOCK = ("hf-qlora", "hf-lora")  # transformers + PEFT + bitsandbytes, as their documentation writes it
PEERS = ("unsloth", "torchtune", "llama-factory")  # measured where they are installed

_WORK = r"(\d+)x(?:(\d+)x)?(\d+)"


@dataclass(frozen=True, slots=True, order=True)
class Work:
    """One optimizer step: k micro-batches of `rows` sequences of `tokens` each."""

    k: int
    rows: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Work:
        """`8x128` is 8 micro-batches of one row of 128 tokens, `8x4x128` of four. Raises ValueError."""
        found = re.fullmatch(_WORK, text)
        numbers = [int(part or 1) for part in found.groups()] if found else [0]
        if min(numbers) < 1 or numbers[-1] < 2:
            raise ValueError(f"`{text}` is not MICRO_BATCHESxTOKENS or MICRO_BATCHESxROWSxTOKENS, as 8x128 or 8x4x128")
        return cls(*numbers)

    @property
    def tokens_per_step(self) -> int:
        """Of all micro-batches."""
        return self.k * self.rows * self.tokens

    def __str__(self) -> str:
        return f"{self.k} x {self.tokens}" if self.rows == 1 else f"{self.k} x {self.rows} x {self.tokens}"


@dataclass(frozen=True, slots=True)
class Setup:
    """What one process is: a method on a model.

    name      of its row, for people; differs from the method where a suite has several of one
    model     hub id, directory, .gguf file, or the name of a shape
    is_shape  the model is a shape, whose weights are drawn
    memory    of ours: keys of the recipe's section. Others ignore it
    vram      GiB of the device that the process may take; None: all
    recipe    a recipe whose rows are trained on; None: random tokens
    """

    name: str
    method: Method
    model: str
    is_shape: bool
    r: int
    optim: Optim
    device: str  # "cpu", or an accelerator's type
    vram: float | None = None
    memory: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None

    @property
    def title(self) -> str:
        """For people."""
        cap = f" in {self.vram:g} GiB" if self.vram is not None else ""
        return f"{self.name} on {short(self.model)}{cap}"


def short(model: str) -> str:
    """A model's name without its place."""
    return Path(model).name.removesuffix(".json").removesuffix(".gguf")


class Variant(Section):
    """A method in a suite that is not run as it comes."""

    method: Method = Field(description="What is measured.")
    name: str | None = Field(default=None, min_length=1, description="Of its row; null = the method.")
    memory: dict[str, Any] = Field(
        default_factory=dict, description="Keys of the recipe's `memory` section, for our own methods."
    )


class Suite(Section):
    """What to measure: every method on every model, rank and cap, at every work."""

    title: str = Field(min_length=1, description="What the table is called.")
    device: Literal["any", "gpu"] = Field(default="any", description="`gpu` = where none is, nothing is measured.")
    model: list[str] = Field(
        default_factory=list, description="Hub ids, directories with safetensors or .gguf files, the smallest first."
    )
    shape: list[str] = Field(
        default_factory=list,
        description="Models of random weights, the smallest first: names in benchmarks/shapes, or config.json files.",
    )
    methods: list[Method | Variant] = Field(min_length=1, description="The first is what the others are compared with.")
    work: list[str] = Field(min_length=1, description="MICRO_BATCHESxTOKENS or MICRO_BATCHESxROWSxTOKENS of a step.")
    r: list[int] = Field(default=[16], min_length=1, description="Ranks of the adapter, on all linear layers.")
    optim: Optim = Field(default="adamw_torch", description="The optimizer, of every method.")
    vram: list[float] = Field(
        default_factory=list, description="GiB of a GPU that each process may take, to act as a smaller card."
    )
    memory: dict[str, Any] = Field(
        default_factory=dict, description="Keys of the recipe's `memory` section, for all of our own methods."
    )
    recipe: str | None = Field(default=None, description="A recipe whose rows are trained on; null = random tokens.")
    search: Literal["context", "model"] | None = Field(
        default=None,
        description="Look for what just trains: the longest `context`, by bisection between the tokens of the first "
        "and the last work; or the largest `model`, of those listed.",
    )
    predict: bool = Field(default=False, description="Say beside each row of ours what `qlora plan` says of it.")
    warm_up: int = Field(default=1, ge=0, description="Steps that are not timed, beside one that is counted.")
    steps: int = Field(default=3, ge=1, description="Steps that are timed.")
    limit_s: float = Field(default=900.0, gt=0, description="Seconds that a process may take for all of its works.")

    def contradictions(self) -> Iterator[Contradiction]:
        if not self.model and not self.shape:
            yield Contradiction("model", "a suite needs `model` or `shape`")
        for n, text in enumerate(self.work):
            try:
                Work.parse(text)
            except ValueError as error:
                yield Contradiction(f"work.{n}", str(error))
        names = [variant.name or variant.method for variant in self.variants]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield Contradiction("methods", f"two methods are named `{name}`", "give one of them another `name`")

    @property
    def variants(self) -> list[Variant]:
        """The methods, with what differs from how they come."""
        return [each if isinstance(each, Variant) else Variant(method=cast(Method, each)) for each in self.methods]

    @property
    def works(self) -> list[Work]:
        """What each process does, the smallest first: buffers that a method keeps for its next step would be too large
        for a smaller one, and counted."""
        return sorted((Work.parse(text) for text in self.work), key=lambda work: work.tokens_per_step)

    def groups(self, device: str) -> Iterator[list[Setup]]:
        """The setups that are compared with one another, group by group: they differ in the method alone."""
        models = [(name, False) for name in self.model] + [(name, True) for name in self.shape]
        for (model, is_shape), r, vram in itertools.product(models, self.r, self.vram or [None]):
            yield [
                Setup(
                    name=variant.name or variant.method,
                    method=variant.method,
                    model=model,
                    is_shape=is_shape,
                    r=r,
                    optim=self.optim,
                    device=device,
                    vram=vram,
                    memory=self.memory | variant.memory if variant.method in OURS else {},
                    recipe=self.recipe,
                )
                for variant in self.variants
            ]
