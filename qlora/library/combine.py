"""Several adapters of one base as one adapter: PEFT's `add_weighted_adapter`, on weights that need not be there.

PEFT combines the adapters that stand on a model. What it reads of the model are the shapes of its weights, and those
are in the adapters' files: so each weight in turn is stood in for by a linear layer of one number, expanded to the
shape, and the adapters' A and B of that weight are combined on it. The base is not loaded, and no more than one dense
change stands in memory, for the methods that take it apart (`*svd`).

Each adapter's scaling goes along as it is in its own configuration (rsLoRA, rank and alpha patterns, layers that it
leaves out), and what comes of it has one rank and the scaling 1. Whole models would not do as well: there the first
adapter's rsLoRA scales the combination once more, and its `layers_to_transform` drops what only the others are on.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qlora.durable import Draft
from qlora.errors import AdapterError, QLoRAError
from qlora.library.diff import Factors, NotPlain, Weights, change_norms
from qlora.library.facts import CONFIG, RECIPE, RUN, WEIGHTS, read_facts
from qlora.library.files import FILES, check_recorded
from qlora.model.adapters import read_config
from qlora.model.shards import write_safetensors
from qlora.model.source import read_tokenizer

__all__ = ["DENSITY", "METHODS", "Combination", "Share", "combine", "facts_of", "plan"]

_ONE_RANK = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")  # A with A and B with B: they must fit
METHODS = ("cat", "svd", *(f"{name}{svd}" for name in _ONE_RANK for svd in ("", "_svd") if name + svd != "linear_svd"))
_ANY_RANK = "cat, svd or one that ends in _svd"
_PRUNES = re.compile("ties|dare|prune")
_MOST_WEIGHT = 1_000_000  # beyond, and below 1 by it, nothing is left but one of the adapters
_MOST_RANK = 4096  # of no use beyond; what comes of it is as large as its rank says
DENSITY = 0.5  # share of the values that pruning methods keep
_TOKENIZER = tuple(name for name in FILES if name not in (CONFIG, WEIGHTS, RECIPE, RUN, "README.md"))


@dataclass(frozen=True, slots=True)
class Share:
    """An adapter of a combination.

    name    for people, and no other's here
    weight  that its change of the base is taken times, by PEFT's rules for the method; may be negative
    """

    name: str
    path: Path
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Combination:
    """What is to be combined, and how: checked.

    method   one of METHODS
    density  share of the values that a pruning method keeps; None for the others
    rank     of what comes of it
    seed     of what is pruned by chance, as DARE does; None for the others
    notes    what to know of it, in sentences
    """

    shares: tuple[Share, ...]
    method: str
    density: float | None
    rank: int
    seed: int | None
    notes: list[str] = field(default_factory=list)


def plan(
    words: Sequence[str],
    resolve: Callable[[str], Path],
    out: Path | None = None,
    *,
    method: str = "cat",
    density: float | None = None,
    rank: int | None = None,
    seed: int | None = None,
) -> Combination:
    """What is to be combined, checked before anything is written.

    words    `NAME:WEIGHT`, or `NAME` for a weight of 1. What follows the last `:` is a weight if it is a number, and
             else part of the name, as in NAME:TAG or a path
    resolve  name or path -> the adapter's directory; raises AdapterError
    out      where it is to lie; nothing may be there
    density, rank, seed  as Combination has them; None: DENSITY, the largest rank, 0

    Raises one AdapterError for all that is wrong.
    """
    notes: list[str] = []
    shares, problems = _shares(words, resolve)
    problems += _options(method, density, rank, seed)
    if out is not None and os.path.lexists(out):
        problems.append(f"--out {out}: is there already; nothing is overwritten")
    unfit = [problem for share in shares for problem in _unfit(share)]
    ranks: list[list[int]] = []
    if not unfit and len(shares) == len(words) > 1:
        sources = {share.name: Weights(share.path) for share in shares}
        unfit += _other_base(shares)
        wrong, ranks = _ranks(sources, method)
        unfit += [*wrong, *_tokenizers(shares, notes)]
    if problems := problems + unfit:
        raise AdapterError("\n".join(problems))
    chance = "dare" in method
    return Combination(
        shares=tuple(shares),
        method=method,
        density=(DENSITY if density is None else density) if _PRUNES.search(method) else None,
        rank=rank or max(sum(each) if method == "cat" else max(each) for each in ranks),
        seed=(seed or 0) if chance else None,
        notes=notes,
    )


def _shares(words: Sequence[str], resolve: Callable[[str], Path]) -> tuple[list[Share], list[str]]:
    """The adapters that could be found, and what is wrong with any of the words."""
    found: list[Share] = []
    problems = [] if len(words) > 1 else ["one adapter alone is nothing to combine: give two or more, NAME:WEIGHT each"]
    for word in words:
        reference, weight = word, 1.0
        head, colon, tail = word.rpartition(":")
        if colon and (number := _number(tail)) is not None:
            reference, weight = head, number
        if not 1 / _MOST_WEIGHT <= abs(weight) <= _MOST_WEIGHT:
            problems.append(
                f"{word}: a weight is {1 / _MOST_WEIGHT:g} to {_MOST_WEIGHT:,}, or minus that: {reference}:0.6"
            )
        try:
            path = resolve(reference)
        except AdapterError as error:
            hint = f"\n  `{tail[:40]}` is no number, so it is no weight: {head}:0.6"
            problems.append(f"{error}{hint if colon and reference == word else ''}")
            continue
        if same := next((each for each in found if each.path.resolve() == path.resolve()), None):
            problems.append(f"{word}: the same adapter as {same.name}; give it once, with the sum of the weights")
        taken = [each.name for each in found]
        found.append(Share(_name(path if "/" in reference else Path(reference), taken), path, weight))
    return found, problems


def _options(method: str, density: float | None, rank: int | None, seed: int | None) -> Iterator[str]:
    if method not in METHODS:
        yield f"--method {method}: PEFT has\n  {', '.join(METHODS)}"
    if density is not None and not (_PRUNES.search(method) and 0 < density <= 1):
        yield f"--density {density:g}: the share of values that ties, dare and prune methods keep, above 0, at most 1"
    if rank is not None and not (method.endswith("svd") and 1 <= rank <= _MOST_RANK):
        yield f"--rank {rank}: 1 to {_MOST_RANK:,}, of methods that end in svd; of the others it follows"
    if seed is not None and not ("dare" in method and 0 <= seed < 2**40):
        yield f"--seed {seed}: 0 or more, of dare methods; the others leave nothing to chance"


def combine(combination: Combination, draft: Draft) -> float:
    """Write the combination as a PEFT LoRA directory, with tokenizer and recipe of the first adapter that has them.

    returns how far its change of the base is from the weighted sum of the adapters' changes, in parts of that sum,
    by Frobenius norms: 0 for `cat`. Raises OSError, and AdapterError where what comes of it is not finite.
    """
    shares = combination.shares
    sources = [Weights(share.path) for share in shares]
    tensors: dict[str, torch.Tensor] = {}
    away, total = [], []
    modules = list(dict.fromkeys(name for each in sources for name in each.modules))
    for at, module in enumerate(modules):
        factors = [each.factors(module) for each in sources]
        A, B = _combined(factors, combination, at)
        if not (A.isfinite().all() and B.isfinite().all()):
            raise AdapterError(f"{module}: combined by {combination.method}, it has values that are not finite")
        names = next(each.modules[module] for each in sources if module in each.modules)
        tensors[names["A"]], tensors[names["B"]] = _padded(A, combination.rank, 0), _padded(B, combination.rank, 1)
        present = [(f, share.weight) for f, share in zip(factors, shares, strict=True) if f]
        exact = torch.cat([f[0] for f, _ in present]), torch.cat([f[1] * f[2] * w for f, w in present], 1), 1.0
        _, norm, difference = change_norms((A, B, 1.0), exact)
        away.append(difference)
        total.append(norm)
    with draft.writer(WEIGHTS) as writer:
        write_safetensors(writer, tensors)
    _config(combination, sources, modules).save_pretrained(str(draft.path))
    voice = next((share.path for share in shares if (share.path / "tokenizer_config.json").is_file()), None)
    for path in {each for name in _TOKENIZER for each in voice.glob(name)} if voice else ():
        draft.write(path.name, path.read_bytes())
    if (recipe := next((share for share in shares if (share.path / RECIPE).is_file()), None)) is not None:
        said = f"# Of {recipe.name}, the first of the adapters that were combined: {RUN} has all of them.\n"
        draft.write(RECIPE, said.encode() + (recipe.path / RECIPE).read_bytes())
    return math.hypot(*away) / (math.hypot(*total) or 1.0)


def _combined(factors: Sequence[Factors | None], how: Combination, at: int) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's combination of what adapters do to one weight: A [rank, in], B [out, rank] of scaling 1, fp32.

    at  counts the weights: each has draws of its own. An adapter that is not on the weight changes it by 0, with
        which every method does as PEFT does without that adapter.
    """
    A, B, _ = next(each for each in factors if each)
    rank, outputs, inputs = A.shape[0], B.shape[0], A.shape[1]
    there = [each or (torch.zeros(rank, inputs), torch.zeros(outputs, rank), 1.0) for each in factors]
    stand_in = nn.Linear(inputs, outputs, bias=False, device="meta")
    stand_in.weight = nn.Parameter(torch.zeros(1).expand(outputs, inputs), requires_grad=False)
    names = [f"adapter{n}" for n in range(len(there))]
    # PEFT's scaling is lora_alpha / r.
    configs = [LoraConfig(r=len(A), lora_alpha=scale * len(A), target_modules=["weight"]) for A, _, scale in there]  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a density of 1 prunes nothing
        model: Any = get_peft_model(nn.ModuleDict({"weight": stand_in}), configs[0], adapter_name=names[0])  # type: ignore[arg-type]
        for name, config in zip(names[1:], configs[1:], strict=True):
            model.add_adapter(name, config)
        layer = model.base_model.model["weight"]
        for name, (A, B, _) in zip(names, there, strict=True):
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = A.float(), B.float()
        torch.manual_seed(_draw(how.seed or 0, at))
        model.add_weighted_adapter(
            names,
            [share.weight for share in how.shares],
            "combined",
            combination_type=how.method,
            svd_rank=min(how.rank, outputs, inputs) if how.method.endswith("svd") else None,
            svd_full_matrices=False,  # else U has outputs x outputs values, of which `rank` columns are kept
            density=how.density,
        )
    return layer.lora_A["combined"].weight.data, layer.lora_B["combined"].weight.data


def _config(how: Combination, sources: Sequence[Weights], modules: Sequence[str]) -> LoraConfig:
    """The first adapter's, with the combination's rank and a scaling of 1; on the weights that any of them is on."""
    first = read_config(how.shares[0].path)
    places: dict[str, Any] = {}
    if set(sources[0].modules) != set(modules):
        places = {"target_modules": set(modules), "exclude_modules": None}
        places |= {"layers_to_transform": None, "layers_pattern": None}
    plain = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True}
    return dataclasses.replace(first, r=how.rank, lora_alpha=how.rank, inference_mode=True, **plain, **places)


# --- what cannot be combined


def _unfit(share: Share) -> Iterator[str]:
    """Why an adapter is more than A and B."""
    try:
        check_recorded(share.path)
        config, others = read_config(share.path), Weights(share.path).others
    except QLoRAError as error:
        yield str(error)
        return
    start = config.init_lora_weights
    more = [
        ("use_dora", config.use_dora, "magnitudes (DoRA) do not add"),
        ("bias", config.bias != "none", "biases are the base's, which other adapters do not expect changed"),
        ("lora_bias", config.lora_bias, "PEFT does not combine it"),
        ("modules_to_save", config.modules_to_save, "whole modules cannot be combined, only LoRA"),
        ("target_parameters", config.target_parameters, "PEFT does not combine it"),
        ("trainable_token_indices", config.trainable_token_indices, "PEFT does not combine it"),
        ("init_lora_weights", isinstance(start, str) and start != "gaussian", f"{start} changes the base itself"),
    ]
    said = [f"{share.name}: cannot be combined: `{key}`: {why}" for key, there, why in more if there]
    if others and not said:
        said = [f"{share.name}: cannot be combined: it has {len(others)} tensors beside LoRA's: {others[0]}"]
    yield from said


def _other_base(shares: Sequence[Share]) -> Iterator[str]:
    """By fingerprint where both have one, else by name."""
    first, *others = [(share, read_facts(share.path)) for share in shares]
    for share, facts in others:
        mine, theirs = first[1].base_fingerprint, facts.base_fingerprint
        same = mine == theirs if mine and theirs else (first[1].base, first[1].revision) == (facts.base, facts.revision)
        if not same:
            note = " (the names are the same, the weights are not)" if first[1].base == facts.base else ""
            yield f"{share.name}: for another base than {first[0].name}: {facts.base}, not {first[1].base}{note}"


def _ranks(sources: Mapping[str, Weights], method: str) -> tuple[list[str], list[list[int]]]:
    """What is wrong between the adapters' weights, and the ranks of the adapters at each weight."""
    shapes: list[str] = []
    broken: list[str] = []
    uneven: list[str] = []
    ranks = []
    for module in dict.fromkeys(name for each in sources.values() for name in each.modules):
        try:
            there = [(name, each.factors(module)) for name, each in sources.items()]
        except NotPlain:
            broken.append(f"{module}: is not plain A and B of the rank that {CONFIG} has")
            continue
        found = [(name, factors) for name, factors in there if factors]
        broken += [
            f"{name}: has values that are not finite in {module}"
            for name, (A, B, _) in found
            if not (A.isfinite().all() and B.isfinite().all())
        ]
        sizes = {name: f"{B.shape[0]} x {A.shape[1]}" for name, (A, B, _) in found}
        if len(set(sizes.values())) > 1:
            shapes.append(f"for different bases: {module} is " + ", ".join(f"{s} in {n}" for n, s in sizes.items()))
        # Where an adapter is not on the weight it takes the place of one like the first that is.
        ranks.append([len((factors or found[0][1])[0]) for _, factors in there])
        if method in _ONE_RANK and len({len(A) for _, (A, _, _) in found}) > 1:
            each = ", ".join(f"{len(A)} in {name}" for name, (A, _, _) in found)
            uneven.append(f"different ranks: {module} has {each}\n  these can be combined by {_ANY_RANK}")
    problems = [f"{kind[0]}" + f" (and {len(kind) - 1} more)" * (len(kind) > 1) for kind in (shapes, broken) if kind]
    return [*problems, *uneven[:1]], ranks


def _tokenizers(shares: Sequence[Share], notes: list[str]) -> Iterator[str]:
    """One adapter has one tokenizer and one template: tokens that differ are wrong, templates that do are noted."""
    said = [(share, read_tokenizer(share.path)) for share in shares if (share.path / "tokenizer_config.json").is_file()]
    for share, tokenizer in said[1:]:
        first, vocabulary = said[0][0], said[0][1].get_vocab()
        if tokenizer.get_vocab() != vocabulary:
            yield f"{share.name}: its tokenizer has other tokens than that of {first.name}"
        if tokenizer.chat_template != said[0][1].chat_template:
            notes.append(
                f"{share.name} was trained with another chat template; the combination has that of {first.name}"
            )


# --- parts


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _name(path: Path, taken: Sequence[str]) -> str:
    """What to call the adapter in a directory: a word that no other here has."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name.partition("@")[0]).strip("._-")[:48] or "adapter"
    name = f"{name}-adapter" if name in ("base", "combined") else name
    return next(each for each in (name, *(f"{name}-{n}" for n in range(2, 999))) if each not in taken)


def _draw(seed: int, at: int) -> int:
    return (seed * 1_000_003 + at) % 2**63


def _padded(matrix: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    """With zeros up to the rank, which change nothing: one rank for all weights."""
    room = list(matrix.shape)
    room[dim] = rank - room[dim]
    return torch.cat([matrix, matrix.new_zeros(room)], dim).contiguous()


def facts_of(combination: Combination, sha256: Mapping[str, str]) -> dict[str, Any]:
    """Its lineage, as a run.json has it. sha256: of each adapter's weights, by name."""
    shares = [{"name": s.name, "sha256": sha256[s.name], "weight": s.weight} for s in combination.shares]
    how = {"method": combination.method, "density": combination.density, "rank": combination.rank}
    how |= {"seed": combination.seed}
    return {"combined_from": shares, "combined_by": {key: value for key, value in how.items() if value is not None}}
