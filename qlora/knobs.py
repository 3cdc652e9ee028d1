"""What the fields of `config` say of themselves: for the README's table, and for complaints about a recipe."""

import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qlora.config import Config

__all__ = ["FIELDS", "KeyPath", "Knob", "alternatives", "annotation_at", "choices", "field_key", "fields_of", "knobs"]

KeyPath = tuple[str | int, ...]  # where a value is in a recipe: ("data", "datasets", 0, "path")


class Knob(NamedTuple):
    """A row of the README's table. All four are text ready to print; `default` is as a recipe would spell it."""

    key: str
    type: str
    default: str
    meaning: str


def knobs() -> Iterator[Knob]:
    """Every knob of a recipe, in the order of `config`. Sections are not knobs; `data.eval_datasets` says
    that it has the shape of `data.datasets` and is not spelled out again."""
    for key, field in FIELDS.items():
        kinds = alternatives(field.annotation)
        if kinds == ["section"] or key.startswith("data.eval_datasets[]"):
            continue
        default = "required" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
        yield Knob(key, " or ".join(kinds), default.replace('"', ""), field.description or "")


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field under a section, sections themselves included, by dotted key; `[]` stands for an index of a list."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        yield key, field
        inner, suffix = field.annotation, "."
        if get_origin(inner) is list:
            inner, suffix = get_args(inner)[0], "[]."
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields_of(inner, key + suffix)


def alternatives(annotation: Any) -> list[str]:
    """The kinds of value that an annotation admits, in plain words: `str | list[int] | None` -> text, list of whole
    numbers, null.

    Each comes without an article, so that a table and a sentence can both use it.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return [words for arg in args for words in alternatives(arg)]
    if origin is Annotated:
        examples = [str(e) for meta in args[1:] if isinstance(meta, FieldInfo) for e in meta.examples or ()]
        return [f"text like `{examples[0]}`"] if examples else alternatives(args[0])
    if origin is Literal:
        *most, last = [f"`{value}`" for value in args]
        return [f"{', '.join(most)} or {last}" if most else last]
    if origin is list:
        element = " or ".join(alternatives(args[0]))
        return [f"list of {element}" + ("s" if element.endswith(("number", "section")) else "")]
    if origin is dict:
        return [f"mapping of text to {' or '.join(alternatives(args[1]))}"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ["section"]
    return [{str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null"}[annotation]]


def annotation_at(path: KeyPath) -> Any:
    """The type that Config gives to a path, None where it gives none."""
    at: Any = Config
    for part in path:
        for branch in _branches(at):
            if isinstance(branch, type) and issubclass(branch, BaseModel):
                info = branch.model_fields.get(str(part))
                at = info.annotation if info else None
                break
            if get_origin(branch) is (list if isinstance(part, int) else dict):
                at = get_args(branch)[-1]
                break
        else:
            return None
    return at


def _branches(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    if get_origin(annotation) in (None, list, dict, Literal, Annotated):
        return (annotation,)
    return get_args(annotation)


def choices(annotation: Any) -> Iterator[str]:
    """Every word that an annotation's Literals allow."""
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    else:
        for arg in get_args(annotation):
            yield from choices(arg)


FIELDS = dict(fields_of(Config))


def field_key(path: KeyPath) -> str:
    """The key in FIELDS for a path: data.datasets.0.path -> data.datasets[].path."""
    return "".join("[]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
