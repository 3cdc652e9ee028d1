"""How what is wrong with a recipe is said: pydantic's findings, PyYAML's and the file system's, in plain words.

A complaint is a message and a hint, as in `errors.Problem`; `recipe` knows where what it is about was written.
"""

import difflib
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import ErrorDetails

from qlora.knobs import FIELDS, KeyPath, alternatives, annotation_at, choices, field_key
from qlora.section import ContradictionError
from qlora.yaml12 import CORE, OutOfBounds

SHOWN = 48  # characters of a wrong value that a message repeats
NUMBERS = {"number": "float", "whole number": "int"}
LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}

# Names that other trainers give to knobs we have, so that what people paste is understood.
RENAMED = {
    "alpha": "lora.lora_alpha",
    "attention": "model.attn_implementation",
    "base_model": "model.model_name_or_path",
    "batch_size": "training.per_device_train_batch_size",
    "bf16": "model.dtype",
    "cutoff_len": "data.max_seq_length",
    "dataset": "data.datasets",
    "dropout": "lora.lora_dropout",
    "epochs": "training.num_train_epochs",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "eval_dataset": "data.eval_datasets",
    "finetuning_type": "method",
    "fp16": "model.dtype",
    "gradient_clipping": "training.max_grad_norm",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "max_length": "data.max_seq_length",
    "max_new_tokens": "training.generation_max_length",
    "micro_batch_size": "training.per_device_train_batch_size",
    "model_id": "model.model_name_or_path",
    "model_name": "model.model_name_or_path",
    "num_epochs": "training.num_train_epochs",
    "optimizer": "training.optim",
    "rank": "lora.r",
    "sample_packing": "data.packing",
    "scheduler": "training.lr_scheduler_type",
    "sequence_len": "data.max_seq_length",
    "test_datasets": "data.eval_datasets",
    "torch_dtype": "model.dtype",
    "train_on_inputs": "data.assistant_only_loss",
    "val_set_size": "data.eval_fraction",
    "warmup": "training.warmup_ratio",
}
# The same inside a row of data.datasets.
RENAMED_IN_ROW = {"config": "name", "data_files": "path", "file": "path", "subset": "name", "type": "format"}
# Names from elsewhere that need no knob here.
NEEDLESS = {
    "<<": "YAML 1.2 has no merge keys: write the keys out",
    "gradient_checkpointing": "leave it out: layers are always recomputed in the backward pass",
    "use_gradient_checkpointing": "leave it out: layers are always recomputed in the backward pass",
    "task_type": "leave it out: it is always CAUSAL_LM",
    "use_cache": "leave it out: training keeps no cache",
}


def explain(
    errors: Sequence[ErrorDetails], values: Any, written: Mapping[KeyPath, str | None], unread: Container[KeyPath]
) -> Iterator[tuple[KeyPath, str, str]]:
    """Pydantic's findings as (path, message, hint), one for each thing that is wrong.

    values   what was validated
    written  the text of each scalar, by path
    unread   paths of values that could not be read, and have their complaint already
    """
    # Each branch of a union fails on its own: of the errors of one value keep the one that got furthest into it,
    # and a limit that was passed before a type that was not met.
    best: dict[KeyPath, tuple[tuple[int, bool], KeyPath, ErrorDetails]] = {}
    meant: list[str] = []  # what unknown keys stand for: a knob that is misspelt is not also missing
    for details in errors:
        path, group = _walk(details["loc"], values)
        if details["type"] == "extra_forbidden":
            path = details["loc"]
            target, hint = _did_you_mean(path)
            meant += [f"{target}."] if target else []
            yield path, f"unknown key `{dotted(path)}`", hint
            continue
        if details["type"] == "missing":
            path = group = details["loc"]
        rank = (len(path), not LIMITS.keys().isdisjoint(details.get("ctx", {})))
        if group not in best or rank > best[group][0]:
            best[group] = (rank, path, details)
    for _, path, details in best.values():
        error = details.get("ctx", {}).get("error")
        if isinstance(error, ContradictionError):
            for found in error.found:
                yield (*path, *_parts(found.key)), found.message, found.hint
        elif details["type"] == "missing":
            if not f"{dotted(path)}.".startswith(tuple(meant)):
                yield path, f"missing `{dotted(path)}`", _meaning(path)
        elif path not in unread:
            yield path, *_complaint(path, details, written.get(path))


def _walk(loc: KeyPath, values: Any) -> tuple[KeyPath, KeyPath]:
    """Where in the values an error is: (its path, the path of the union that it is in, else its own).

    Pydantic's `loc` also names branches of unions, (lora, target_modules, list[str], 0), which are not in the values.
    """
    path: KeyPath = ()
    union: KeyPath | None = None
    for part in loc:
        if _holds(values, part) and annotation_at((*path, part)) is not None:
            values, path = values[part], (*path, part)
        elif union is None:
            union = path
    return path, path if union is None else union


def _holds(values: Any, part: str | int) -> bool:
    if isinstance(values, dict):
        return part in values
    return isinstance(values, list) and isinstance(part, int) and part < len(values)


def _complaint(path: KeyPath, details: ErrorDetails, text: str | None) -> tuple[str, str]:
    """What is wrong with one value, as (message, hint)."""
    key, given, context = f"`{dotted(path)}`", got(details["input"], text), details.get("ctx", {})
    for limit in LIMITS.keys() & context:
        return f"{key} must be {LIMITS[limit]} {_number(context[limit])}, got {given}", ""
    if details["type"] == "finite_number":
        return f"{key} must be finite, got {given}", ""
    if details["type"] in ("too_short", "string_too_short"):
        return f"{key} must not be empty", ""
    annotation = annotation_at(path)
    expected = " or ".join(_with_article(kind) for kind in alternatives(annotation))
    return f"{key} expects {expected}, got {given}", _mend(annotation, details["input"], text)


def _mend(annotation: Any, value: Any, text: str | None) -> str:
    """How to turn a value of the wrong kind into one of the right kind, if that can be told."""
    kinds = alternatives(annotation)
    if isinstance(value, str):
        close = difflib.get_close_matches(value.lower(), list(choices(annotation)), n=1, cutoff=0.5)
        if close:
            return f"did you mean `{close[0]}`?"
        if "true or false" in kinds and value.lower() in ("yes", "y", "on", "no", "n", "off", "true", "false"):
            return f"write `{'true' if value.lower() in ('yes', 'y', 'on', 'true') else 'false'}`, without quotes"
        plain = value.replace("_", "")
        if any(kind in kinds and CORE[core].match(plain) for kind, core in NUMBERS.items()):
            return f"write `{plain}`, without quotes"
    if isinstance(value, float) and "whole number" in kinds and value.is_integer() and abs(value) < 1e15:
        return f"write `{int(value)}`"
    if text and isinstance(value, bool | int | float) and "text" in kinds:
        return f'put it in quotes: "{clip(text)}"'
    if isinstance(value, str) and "list of text" in kinds:
        return f"write `[{clip(value)}]`"
    if isinstance(value, dict) and "list of sections" in kinds:
        return "start each entry with `- `"
    return ""


def _did_you_mean(path: KeyPath) -> tuple[str, str]:
    """For an unknown key: (the dotted key that was probably meant or "", a hint or "")."""
    name, parent = str(path[-1]), path[:-1]
    if name in NEEDLESS:
        return "", NEEDLESS[name]
    siblings = [key.rpartition(".")[2] for key in FIELDS if key.rpartition(".")[0] == field_key(parent)]
    close = difflib.get_close_matches(name.lower(), siblings, n=1, cutoff=0.7)
    sibling = dotted((*parent, close[0])) if close else ""
    if "[]" in field_key(parent):  # a row's names (path, name, split) mean other things elsewhere: only its own will do
        sibling = dotted((*parent, RENAMED_IN_ROW[name])) if name in RENAMED_IN_ROW else sibling
        return sibling, f"did you mean `{sibling}`?" if sibling else ""
    sections = {key.rpartition(".")[2]: key for key in FIELDS if "[]" not in key}
    unnested = difflib.get_close_matches(name.lower(), sections.values(), n=1, cutoff=0.8) if "." in name else []
    if unnested:
        section, _, leaf = unnested[0].rpartition(".")
        return unnested[0], f"nest it: `{leaf}` under `{section}:`"
    further = difflib.get_close_matches(name.lower(), sections, n=1, cutoff=0.8)
    target = sections.get(name) or RENAMED.get(name) or sibling or (sections[further[0]] if further else "")
    return target, f"did you mean `{target}`?" if target else ""


def _meaning(path: KeyPath) -> str:
    """The first sentence of a field's description."""
    return (FIELDS[field_key(path)].description or "").partition(". ")[0].removesuffix(".")


def not_a_recipe(values: Any) -> tuple[str, str]:
    hint = "it needs at least `model: {model_name_or_path: ...}` and `data: {datasets: [{path: ...}]}`"
    if values is None:
        return "the recipe is empty", hint
    return f"a recipe is a mapping of sections, this is {got(values, None)}", hint


def syntax(error: yaml.MarkedYAMLError, numbered: bool) -> tuple[str, str]:
    """PyYAML's complaint as (message, hint), the common ones in terms of what was typed."""
    problem = error.problem or error.context or "unreadable"
    if isinstance(error, OutOfBounds):
        return problem, "a recipe needs far less"
    if "'\\t'" in problem:
        return "a tab where YAML wants spaces", "indent with spaces"
    if "mapping values are not allowed" in problem:
        return "a `:` where no key can be", "check the indentation here and above; text with `: ` inside needs quotes"
    if "another document" in problem:
        return "a second document starts here, and a recipe is one", "remove the `---`"
    if "that cannot start any token" in problem:
        return f"not valid YAML: {problem}", "text that starts with it needs quotes"
    if "stream end" in problem or "end of stream" in problem:
        return "not valid YAML: a bracket or a quote is never closed", ""
    start = f" that starts on line {error.context_mark.line + 1}" if error.context_mark and numbered else ""
    context = f", {error.context}{start}" if error.context and error.problem else ""
    return f"not valid YAML: {problem}{context}", ""


def unopened(path: Path, error: Exception) -> tuple[str, str]:
    """Why a recipe could not be opened, as (message, hint), and what is there instead."""
    directory = path if path.is_dir() else path.parent
    try:
        there = sorted(entry.name for entry in directory.iterdir() if entry.suffix in (".yaml", ".yml"))
    except (OSError, ValueError):
        there = []
    if isinstance(error, FileNotFoundError):
        if not directory.is_dir():
            return "no such file", f"there is no directory `{directory}`"
        close = difflib.get_close_matches(path.name, there, n=3, cutoff=0.5)
        names = _list([str(directory / name) for name in close], "or")
        return "no such file", f"did you mean {names}?" if close else ""
    if directory is path:
        return "is a directory, not a recipe", f"it holds {_list(there)}" if there else ""
    return f"cannot be read: {getattr(error, 'strerror', None) or error}", ""


def _list(names: Sequence[str], last: str = "and", most: int = 8) -> str:
    quoted = [f"`{name}`" for name in names[:most]]
    if len(names) > most:
        quoted.append(f"{len(names) - most} more")
    return f" {last} ".join(filter(None, [", ".join(quoted[:-1]), *quoted[-1:]]))


def clip(text: str) -> str:
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def quoted(text: str) -> str:
    return f"`{clip(text)}`"


def dotted(path: KeyPath) -> str:
    return ".".join(clip(str(part)) for part in path)


def got(value: Any, text: str | None) -> str:
    """What was written, and what YAML took it for where that may surprise."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing" if not text else f"`{text}` (nothing)"
    shown = quoted(text if text is not None else str(value))
    return f"the text {shown}" if isinstance(value, str) else shown


def _number(value: float) -> str:
    return str(int(value) if value == int(value) else value)


def _parts(key: str) -> KeyPath:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _with_article(words: str) -> str:
    return f"a {words}" if words.startswith(("number", "whole", "list", "mapping", "section")) else words
