"""How two adapters differ: in recipe, base, data and measured figures, and in what they do to the base's weights.

What an adapter does to a weight is D = s B A, with A [r, in], B [out, r] and s its scaling. Of two of them

    ||D1 - D2||_F^2 = sum over i, j of (G_B * G_A)_ij,    G_B = b^T b,  b = [s1 B1, -s2 B2]   [out, r1 + r2]
                                                          G_A = a a^T,  a = [A1; A2]          [r1 + r2, in]

since b a = D1 - D2 and ||b a||^2 = tr(a^T b^T b a) = tr(G_B G_A), and both are symmetric. Its two diagonal blocks alone
give ||D1||^2 and ||D2||^2. No matrix of the weight's size is formed, and the ranks may differ; a weight that only one
of them is on has D = 0 for the other. In fp64 what is below about 1e-8 of the norms is rounding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from qlora.errors import AdapterError
from qlora.library.facts import CONFIG, WEIGHTS, Facts, read_facts, recipe_of
from qlora.model.untrusted import foreign, read_json

__all__ = [
    "Change",
    "Difference",
    "Factors",
    "NotPlain",
    "Weights",
    "change",
    "change_norms",
    "diff",
    "layer_of",
    "natural",
]

_LORA = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?:embedding_)?(?P<which>[AB])(?:\.weight)?")


@dataclass(frozen=True, slots=True)
class Change:
    """What two adapters do to one weight, or to a group of them: Frobenius norms.

    name        of the weight, the layer or the kind of module
    a, b        ||D1||, ||D2||
    difference  ||D1 - D2||
    """

    name: str
    a: float
    b: float
    difference: float

    @property
    def relative(self) -> float | None:
        """The difference in parts of what A does; None where A does nothing."""
        return self.difference / self.a if self.a else None


@dataclass(frozen=True, slots=True)
class Difference:
    """How adapter A differs from B.

    facts    what each says of itself
    recipe   key -> (A's value, B's), where they differ; None where either has no recipe that can be read
    metrics  figure -> (A's, B's), of all that either has
    weights  by weight; `layers` and `kinds` are the same by layer and by kind of module, `total` all together
    notes    what the comparison leaves out
    """

    facts: tuple[Facts, Facts]
    recipe: dict[str, tuple[Any, Any]] | None
    metrics: dict[str, tuple[float | None, float | None]]
    weights: list[Change]
    layers: list[Change]
    kinds: list[Change]
    total: Change
    notes: list[str]


def diff(a: Path, b: Path) -> Difference:
    """Compare the adapters in two directories. Raises AdapterError where one cannot be read."""
    facts, recipes = (read_facts(a), read_facts(b)), (recipe_of(a), recipe_of(b))
    recipe = None
    if recipes[0] is not None and recipes[1] is not None:
        keys = dict.fromkeys((*recipes[0], *recipes[1]))
        values = {key: (recipes[0].get(key), recipes[1].get(key)) for key in keys}
        recipe = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    names = dict.fromkeys((*facts[0].measured, *facts[1].measured))
    weights, notes = change(a, b)
    return Difference(
        facts=facts,
        recipe=recipe,
        metrics={name: (facts[0].measured.get(name), facts[1].measured.get(name)) for name in names},
        weights=weights,
        layers=_grouped(weights, layer_of),
        kinds=_grouped(weights, lambda name: name.rsplit(".", 1)[-1]),
        total=_together("all", weights),
        notes=notes,
    )


def change(a: Path, b: Path) -> tuple[list[Change], list[str]]:
    """What two adapters do to each weight that either is on, by name, and what is left out. One weight at a time."""
    one, two = Weights(a), Weights(b)
    changes, left_out = [], []
    for module in dict.fromkeys((*one.modules, *two.modules)):
        try:
            first, second = one.factors(module), two.factors(module)
        except NotPlain:
            left_out.append(module)
            continue
        if first and second and _shape(first) != _shape(second):
            shapes = f"{_shape(first)} in one, {_shape(second)} in the other"
            raise AdapterError(f"{a} and {b} are for different bases: {module} has {shapes}")
        changes.append(Change(module, *change_norms(first, second)))
    notes = [f"{len(left_out)} weights are left out, whose LoRA is not plain: {left_out[0]} ..."] if left_out else []
    for weights in (one, two):
        if weights.others:
            notes.append(f"{weights.directory}: {len(weights.others)} tensors beside LoRA's are not compared")
    return changes, notes


Factors = tuple[torch.Tensor, torch.Tensor, float]  # A [r, in], B [out, r], scaling


def change_norms(first: Factors | None, second: Factors | None) -> tuple[float, float, float]:
    """||D1||, ||D2|| and ||D1 - D2|| of two changes of one weight, as at the top of this file; None changes nothing.

    The ranks may differ. The tensors may have any dtype; it is computed in fp64.
    """
    present = [(each[0].double(), each[1].double() * each[2]) for each in (first, second) if each]
    if not present:
        return 0.0, 0.0, 0.0
    signs = [1.0] * bool(first) + [-1.0] * bool(second)
    a = torch.cat([A for A, _ in present])
    b = torch.cat([B * sign for (_, B), sign in zip(present, signs, strict=True)], 1)
    product = (b.T @ b) * (a @ a.T)
    r = first[0].shape[0] if first else 0
    squares = product[:r, :r].sum(), product[r:, r:].sum(), product.sum()
    n1, n2, n = (math.sqrt(max(float(square), 0.0)) for square in squares)  # rounding may leave -1e-20 of nothing
    return n1, n2, n


class NotPlain(Exception):
    """What is in the files is not A and B of the rank that the configuration has, as for stacked experts."""


class Weights:
    """The LoRA factors in an adapter's directory."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._path = directory, directory / WEIGHTS
        config = read_json(directory / CONFIG, AdapterError)
        with foreign(f"{directory / CONFIG}: not a LoRA adapter", AdapterError):
            self._r, self._alpha = int(config["r"]), float(config["lora_alpha"])
            self._ranks, self._alphas = dict(config.get("rank_pattern") or {}), dict(config.get("alpha_pattern") or {})
            self._rooted = bool(config.get("use_rslora"))
        self.modules: dict[str, dict[str, str]] = {}
        self.others: list[str] = []
        with self._open() as file:
            names = sorted(file.keys(), key=natural)
        for name in names:
            if match := _LORA.fullmatch(name):
                self.modules.setdefault(match["module"], {})[match["which"]] = name
            else:
                self.others.append(name)

    def factors(self, module: str) -> Factors | None:
        """A, B and the scaling of a weight; None where the adapter is not on it. Raises NotPlain."""
        names = self.modules.get(module)
        if names is None:
            return None
        with self._open() as file:
            tensors = [file.get_tensor(names[which]) for which in "AB" if which in names]
        with foreign(f"{self.directory / CONFIG}: its patterns cannot be read", AdapterError):
            r = self._ranks.get(get_pattern_key(list(self._ranks), module), self._r)
            alpha = self._alphas.get(get_pattern_key(list(self._alphas), module), self._alpha)
        if [t.shape[dim] for t, dim in zip(tensors, (0, 1), strict=False) if t.dim() > 1] != [r, r]:
            raise NotPlain
        return tensors[0].flatten(1), tensors[1].flatten(1), alpha / (math.sqrt(r) if self._rooted else r)

    def _open(self) -> Any:
        with foreign(f"{self._path}: truncated or not a safetensors file", AdapterError):
            return safe_open(self._path, "pt")


def _grouped(changes: Iterable[Change], key: Callable[[str], str]) -> list[Change]:
    groups: dict[str, list[Change]] = {}
    for each in changes:
        groups.setdefault(key(each.name), []).append(each)
    return [_together(name, each) for name, each in sorted(groups.items(), key=lambda item: natural(item[0]))]


def _together(name: str, changes: Iterable[Change]) -> Change:
    """The norms of several weights' changes as one: squares add."""
    columns: Iterator[tuple[float, ...]] = zip(*((c.a, c.b, c.difference) for c in changes), strict=True)
    return Change(name, *([math.hypot(*column) for column in columns] or [0.0, 0.0, 0.0]))


def layer_of(name: str) -> str:
    """The first number in a weight's name; `-` for what is in no layer, as the embedding."""
    return next((part for part in name.split(".") if part.isdecimal()), "-")


def natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _shape(factors: Factors) -> str:
    return f"{factors[1].shape[0]} x {factors[0].shape[1]}"
