"""`qlora adapters ...`: each action's answer, as lines for people, as a value for programs, and as an exit status."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.durable import readable
from qlora.errors import AdapterError
from qlora.library.facts import Facts, recipe_of
from qlora.library.registry import Registry, Version
from qlora.redact import redact, redacted

if TYPE_CHECKING:
    from qlora.library.diff import Change

__all__ = ["Answer", "answer"]

_WIDTH = 80
_HOW_GOOD = ("exact_match", "eval_loss")  # what a list shows of the figures


@dataclass(frozen=True, slots=True)
class Answer:
    """lines: for the terminal, of at most 80 columns where words allow; value: JSON-able; status: 1 for damage.

    No secret and no control character is in them.
    """

    lines: Sequence[str]
    value: Any
    status: int = 0


def answer(action: str, registry: Registry, *words: str, name: str | None = None, tag: str | None = None) -> Answer:
    """Do what `qlora adapters ACTION WORDS` says. name, tag: the options of `add`.

    Raises AdapterError and MachineError, as Registry does.
    """
    did = {"list": _list, "show": _show, "log": _log, "diff": _diff, "verify": _verify}.get(action)
    found = did(registry, *words) if did else _change(action, registry, *words, name=name, tag=tag)
    return Answer([_plain(line) for line in found.lines], redacted(found.value), found.status)


def _change(action: str, registry: Registry, *words: str, name: str | None, tag: str | None) -> Answer:
    match action, words:
        case "add", (directory,):
            version, did = registry.add(Path(directory), name, tag), "is"
        case "tag", (reference, word):
            version, did = registry.tag(reference, word), "is"
        case "rollback", (reference,):
            version, did = registry.rollback(reference), "is again"
        case "restore", (reference,):
            version, did = registry.restore(reference), "is again"
        case "rm", (reference,):
            note = registry.remove(reference)
            said = [f"{reference}: in the trash; `qlora adapters restore {reference}` brings it back"]
            return Answer([*said, f"  {note}"], {"name": reference, "trash": str(note)})
        case _:
            raise AdapterError(f"adapters {action}: not an action")
    tags = f" ({', '.join(version.tags)})" if version.tags else ""
    return Answer([f"{version.name} {did} {version}{tags}"], _described(registry, version))


def _list(registry: Registry) -> Answer:
    lines, values = [], []
    for name in registry.names():
        versions = registry.versions(name)
        version = registry.find(name)
        number = f"{len(versions)} version{'s' * (len(versions) > 1)}"
        tags = sorted({tag for each in versions for tag in each.tags})
        lines += _wrapped(f"{version}  {', '.join([number, *tags])}", 4)
        try:
            facts = registry.facts(version)
        except AdapterError as error:
            lines += _wrapped(f"  {error}".replace("\n", ";"), 4)
            values.append(_version(version) | {"problem": str(error)})
            continue
        about = [f"base {Path(facts.base).name if facts.base else 'unknown'}", f"r {facts.r}", readable(facts.nbytes)]
        about += [f"{key} {facts.measured[key]:.4g}" for key in _HOW_GOOD if key in facts.measured]
        lines += _wrapped(f"  {', '.join([*about, _when(version.added)])}", 4)
        values.append(_described(registry, version))
    return Answer(lines or [f"no adapters in {registry.home}; `qlora adapters add DIR` takes one"], values)


def _show(registry: Registry, reference: str) -> Answer:
    version = registry.find(reference)
    facts = registry.facts(version)
    all_of_them = len(registry.versions(version.name))
    rows = [
        ("version", f"{version.number} of {all_of_them}" + (", rolled back" if version.withdrawn else "")),
        ("tags", ", ".join(version.tags)),
        ("added", f"{_when(version.added)}, from {version.source}"),
        ("files", str(registry.path(version))),
        ("size", readable(facts.nbytes)),
        *_origin(registry, facts),
        ("lora", f"r {facts.r}, lora_alpha {facts.lora_alpha:g}, on {', '.join(facts.targets)}")
        if facts.lora_alpha is not None
        else ("lora", f"r {facts.r}"),
        ("versions", ", ".join(f"{name} {number}" for name, number in facts.versions.items())),
    ]
    measured = [(name, f"{value:.6g}") for name, value in facts.measured.items()]
    lines = [str(version), *_table(rows)]
    if measured:
        lines += ["  measured", *_table(measured, 4)]
    return Answer(lines, _described(registry, version))


def _log(registry: Registry, name: str) -> Answer:
    versions = registry.versions(name)
    current = registry.find(name)
    lines, values = [], []
    for at in range(len(versions) - 1, -1, -1):
        version = versions[at]
        state = ["current"] * (version == current) + ["rolled back"] * bool(version.withdrawn)
        lines += _wrapped(f"{version}  {', '.join([_when(version.added), *version.tags, *state])}", 4)
        try:
            facts = registry.facts(version)
            parent = registry.parent(facts)
            since = parent or (versions[at - 1] if at else None)
            changed = _recipe_changes(registry, since, version) if since else []
        except AdapterError as error:
            lines += _wrapped(f"  {error}".replace("\n", ";"), 4)
            values.append(_version(version) | {"problem": str(error)})
            continue
        good = ", ".join(f"{key} {value:.4g}" for key, value in facts.measured.items() if "." not in key)
        rows = [*_origin(registry, facts), ("measured", good)]
        lines += _table(rows)
        if changed:
            lines += [f"  recipe, against {since}"]
            lines += [part for key, a, b in changed for part in _wrapped(f"    {key}: {_value(a)} -> {_value(b)}", 8)]
        values.append(_described(registry, version) | {"recipe_changes": {key: [a, b] for key, a, b in changed}})
    return Answer(lines, values)


def _diff(registry: Registry, a: str, b: str) -> Answer:
    from qlora.library.diff import diff  # imports torch

    found = diff(registry.resolve(a), registry.resolve(b))
    lines = [f"A  {a}", f"B  {b}"]
    one, two = found.facts
    for what in ("base", "revision", "base_fingerprint", "data_sha256"):
        left, right = getattr(one, what), getattr(two, what)
        if left == right:
            lines += _wrapped(f"{what}: the same{f', {left}' if left else ' (not recorded)'}", 4)
        else:
            lines += [f"{what}: differs", *_table([("A", _value(left)), ("B", _value(right))], 4)]
    if found.recipe is None:
        lines += ["recipe: one of them has none that can be read"]
    else:
        lines += ["recipe: differs" if found.recipe else "recipe: the same"]
        for key, (left, right) in found.recipe.items():
            lines += _wrapped(f"    {key}: {_value(left)} -> {_value(right)}", 8)
    if found.metrics:
        lines += ["", f"{'measured':<40}{'A':>14}{'B':>14}"]
        lines += [f"  {name[:37]:<38}{_figure(x):>14}{_figure(y):>14}" for name, (x, y) in found.metrics.items()]
    lines += ["", f"{'change of the weights, Frobenius norm':<40}{'A':>10}{'B':>10}{'A - B':>10}{'of A':>10}"]
    lines += _changes("layer", found.layers) + _changes("", found.kinds) + _changes("", [found.total])
    lines += [part for note in found.notes for part in _wrapped(f"note: {note}", 4)]
    value = asdict(found) | {"a": a, "b": b}
    value["facts"] = {"a": asdict(one), "b": asdict(two)}
    return Answer(lines, value)


def _verify(registry: Registry, name: str | None = None) -> Answer:
    found = registry.verify(name)
    lines = [part for each in found for part in _wrapped(f"{each.where}  {each.said}".replace("\n", ";"), 4)]
    bad = sum(each.bad for each in found)
    checked = len({each.where for each in found})
    total = f"{bad} of {checked} damaged" if bad else f"{checked} checked, nothing is damaged"
    return Answer([*lines, total], [asdict(each) for each in found], 1 if bad else 0)


# --- parts


def _described(registry: Registry, version: Version) -> dict[str, Any]:
    facts = registry.facts(version)
    parent = registry.parent(facts)
    return _version(version) | {
        "path": str(registry.path(version)),
        "parent": str(parent) if parent else None,
        "facts": asdict(facts),
    }


def _version(version: Version) -> dict[str, Any]:
    return version.model_dump(mode="json")


def _origin(registry: Registry, facts: Facts) -> list[tuple[str, str]]:
    """Rows on what an adapter was made from."""
    at = f" at {facts.revision}" if facts.revision else ""
    rows = [("base", f"{facts.base}{at}"), ("fingerprint", facts.base_fingerprint or "")]
    rows += [("data", facts.data_sha256 or ("" if facts.combined_from else "not recorded"))]
    if facts.parent_weights:
        unknown = f"{facts.continued_from or 'an adapter'} (weights {facts.parent_weights[:12]}), not in the library"
        rows += [("continued", f"from {registry.parent(facts) or unknown}")]
    if facts.combined_from:
        parts = [
            f"{registry.holder(part.sha256) or f'{part.name} (weights {part.sha256[:12]})'} x {part.weight:g}"
            for part in facts.combined_from
        ]
        rows += [("combined", f"from {' + '.join(parts)}, by {facts.combined_by}")]
    return rows


def _recipe_changes(registry: Registry, before: Version, after: Version) -> list[tuple[str, Any, Any]]:
    old, new = recipe_of(registry.path(before)), recipe_of(registry.path(after))
    if old is None or new is None:
        return []
    keys = dict.fromkeys((*old, *new))
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _changes(what: str, changes: Iterable[Change]) -> list[str]:
    return [
        f"  {f'{what} {each.name}'.strip()[:37]:<38}{each.a:>10.4g}{each.b:>10.4g}{each.difference:>10.4g}"
        f"{'' if each.relative is None else f'{each.relative:.1%}':>10}"
        for each in changes
    ]


def _table(rows: Iterable[tuple[str, str]], indent: int = 2) -> list[str]:
    """Names and values in two columns; what is empty is left out."""
    rows = [row for row in rows if row[1]]
    column = indent + max((len(name) for name, _ in rows), default=0) + 2
    lines = []
    for name, value in rows:
        line = f"{' ' * indent}{name}".ljust(column) + value
        lines += _wrapped(line, column) if " " in value else [line]
    return lines


def _wrapped(line: str, indent: int) -> list[str]:
    """At most 80 columns; what has no space, as a path, stays whole."""
    return textwrap.wrap(
        line, _WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    ) or [""]


def _plain(line: str) -> str:
    """What may be printed: names of files and of bases come from anyone."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in redact(line))


def _value(value: Any) -> str:
    return "none" if value is None else str(value)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
