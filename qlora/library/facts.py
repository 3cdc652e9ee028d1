"""What an adapter says of itself, from the files of its directory alone: its base, its data, how good it was measured.

Whatever a file lacks is None: an adapter trained elsewhere has no run.json and no recipe. Neither torch nor PEFT is
imported, and nothing that a file says is acted on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.errors import AdapterError, RecipeError
from qlora.model.untrusted import read_json
from qlora.recipe import load_recipe

__all__ = ["CONFIG", "RECIPE", "RUN", "WEIGHTS", "Facts", "Part", "flat", "read_facts", "recipe_of"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RUN = "run.json"
RECIPE = "recipe.yaml"


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter of a combination. sha256: of its weights; weight: what it counts in it."""

    name: str
    sha256: str
    weight: float


@dataclass(frozen=True, slots=True)
class Facts:
    """An adapter, as it tells of itself.

    base              the base model's name; `revision` its commit on a hub
    base_fingerprint  of the base's files when it was trained: SHA-256 over pieces of them (model/source.py)
    r, lora_alpha     as in adapter_config.json; `targets` the modules it is on
    data_sha256       of the rows it was trained on
    parent_weights    where training went on from another adapter: the SHA-256 of that one's weights, which is what
                      says which it was: names move, and it need not be in any library
    continued_from    that adapter as the recipe names it
    combined_from     of a combination: the adapters that went in, and in combined_by PEFT's method
    measured          figures by dotted name: eval_loss, exact_match, seconds
    versions          packages it was made with
    nbytes            of all its files
    """

    base: str | None = None
    revision: str | None = None
    base_fingerprint: str | None = None
    r: int | None = None
    lora_alpha: float | None = None
    targets: tuple[str, ...] = ()
    data_sha256: str | None = None
    parent_weights: str | None = None
    continued_from: str | None = None
    combined_from: tuple[Part, ...] = ()
    combined_by: str | None = None
    measured: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0


def read_facts(directory: Path) -> Facts:
    """What the adapter in a directory says of itself. Raises AdapterError where a file cannot be read."""
    config, run = _json(directory / CONFIG), _json(directory / RUN)
    base, versions, targets = run.get("base"), run.get("versions"), config.get("target_modules")
    base, parent = base if isinstance(base, dict) else {}, _text(run.get("continued_from"))
    by = run.get("combined_by")
    return Facts(
        base=_text(config.get("base_model_name_or_path")),
        revision=_text(config.get("revision")) or _text(base.get("revision")),
        base_fingerprint=_text(base.get("fingerprint")),
        r=int(found) if (found := _number(config.get("r"))) is not None else None,
        lora_alpha=_number(config.get("lora_alpha")),
        targets=tuple(sorted(str(each) for each in targets)) if isinstance(targets, list) else _one(targets),
        data_sha256=_text(run.get("data_sha256")),
        parent_weights=parent,
        continued_from=_text((recipe_of(directory) or {}).get("adapter")) if parent else None,
        combined_from=tuple(_parts(run.get("combined_from"))),
        combined_by=_text(by.get("method")) if isinstance(by, dict) else None,
        measured={key: found for key, value in flat(run.get("measured")) if (found := _number(value)) is not None},
        versions={str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
        nbytes=sum(path.stat().st_size for path in directory.iterdir() if path.is_file()),
    )


def recipe_of(directory: Path) -> dict[str, Any] | None:
    """The adapter's recipe by dotted key, defaults included; None where it has none that can be read."""
    try:
        return dict(flat(load_recipe(directory / RECIPE).model_dump(mode="json")))
    except RecipeError:
        return None


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of what lies in dicts and lists; of what is neither, nothing at the top."""
    inner = value if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, list) else None
    if inner:
        for key, each in inner.items():
            yield from flat(each, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, AdapterError) if path.is_file() else {}


def _parts(value: Any) -> Iterator[Part]:
    for each in value if isinstance(value, list) else ():
        match each:
            case {"name": str(name), "sha256": str(sha256), "weight": given} if (weight := _number(given)) is not None:
                yield Part(name, sha256, weight)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _one(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else ()


def _number(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and abs(value) < 1e300 else None  # JSON may hold infinities, and integers past any float
