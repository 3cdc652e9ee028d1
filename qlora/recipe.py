"""Recipes: YAML text in, a `Config` out, or everything that is wrong with the text, by line.

    text --compose--> nodes --_Draft.build--> values + where each came from --overrides--> Config.model_validate
                         |                         |                            |                   |
                       syntax              duplicate keys, tags          keys that lead nowhere   the rest
                         +-------------------------+----------------------------+-------------------+--> RecipeError

The YAML read here is the core schema of YAML 1.2, not PyYAML's 1.1: `1e-5` is a number; `no`, `on` and `2024-01-01` are
text; `010` is ten; there are no merge keys and no tags beyond the core ones. A duplicate key is an error, and what an
alias may expand to is bounded. PyYAML's composer gives the nodes, which know their lines.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from qlora.config import Config, ContradictionError, alternatives, fields_of
from qlora.errors import Problem, RecipeError

__all__ = ["dump_recipe", "load_recipe", "parse_recipe"]

MAX_BYTES = 256 * 1024  # a recipe is a page; this keeps a dataset given by mistake from being parsed for minutes
MAX_DEPTH = 32  # the deepest knob is at 4
MAX_VALUES = 10_000  # counted after aliases are expanded, so nine lines of aliases cannot ask for a billion values
SHOWN = 48  # characters of a wrong value that a message repeats
NUMBERS = {"number": "float", "whole number": "int"}
LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}

# Names that other trainers give to knobs we have, so that what people paste is understood.
RENAMED = {
    "adapter": "method",
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

KeyPath = tuple[str | int, ...]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe.

    path       a UTF-8 YAML file; paths inside it are left as they are, relative to the current directory
    overrides  `key=value` each, applied in order after the file: the key dotted, an index of a list as a part
               (`data.datasets.0.path=my.jsonl`), the value read as YAML (empty = null)

    Raises RecipeError with every problem of the file and the overrides.
    """
    shown = str(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        _fail(shown, *_unopened(Path(path), error))
    if len(raw) > MAX_BYTES:
        _fail(shown, f"is over {MAX_BYTES // 1024} KiB, too large for a recipe", "is it the dataset?")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        _fail(shown, f"not UTF-8 text: byte 0x{raw[error.start]:02x}", "save the file as UTF-8", line)
    return parse_recipe(text, shown, overrides)


def parse_recipe(text: str, file: str = "<recipe>", overrides: Sequence[str] = ()) -> Config:
    """`load_recipe` for text already in memory; `file` is the name that problems are reported under."""
    draft = _Draft(file)
    draft.read(text)
    if isinstance(draft.values, dict):
        for override in overrides:
            draft.override(override)
    elif not draft.problems:
        draft.add((), *_not_a_recipe(draft.values))
    config = draft.validate() if isinstance(draft.values, dict) else None
    if config is None or draft.problems:
        # Overrides come last: they have no line, and were applied last.
        raise RecipeError(*sorted(draft.problems, key=lambda problem: (problem.line is None, problem.line or 0)))
    return config


def dump_recipe(config: Config) -> str:
    """YAML that `load_recipe` reads back to an equal Config: what is required and what differs from its default."""
    values = config.model_dump(exclude_defaults=True)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


# ---------------------------------------------------------------------------------------------------------------------
# YAML 1.2, core schema (section 10.3.2)

_TAG = "tag:yaml.org,2002:"
_CORE = {
    "null": (re.compile(r"(?:null|Null|NULL|~|)\Z"), [*"nN~", ""]),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), [*"tTfF"]),
    "int": (re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), [*"-+0123456789"]),
    "float": (
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        [*"-+.0123456789"],
    ),
}


class _OutOfBounds(yaml.MarkedYAMLError):
    """YAML that is well formed and more than any recipe needs."""


class _Loader(yaml.SafeLoader):
    """Composes nodes whose plain scalars are resolved by the core schema."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth >= MAX_DEPTH:  # before Python's own recursion limit
            mark = self.peek_event().start_mark
            raise _OutOfBounds(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes any text that YAML 1.2 or 1.1 would take for something else, so that every reader sees text. Long text
    with line breaks, a chat template, stands as a block."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML loses U+0085 from every style but double quotes, which escape what cannot be seen.
        plain = data.replace("\n", "").isprintable()
        return self.represent_scalar(f"{_TAG}str", data, style=("|" if "\n" in data else None) if plain else '"')


_Loader.yaml_implicit_resolvers = {}  # in place of PyYAML's table for YAML 1.1
for _kind, (_pattern, _first) in _CORE.items():
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _kind, _pattern, _first)
_Dumper.add_representer(str, _Dumper.represent_str)


def _scalar(kind: str, text: str) -> Any:
    """The value of a scalar. Raises ValueError when an explicit tag does not fit its text, when an int is too long, or
    when text has half of a surrogate pair, which no file or terminal can hold."""
    if kind == "str":
        return text.encode("utf-16", "surrogatepass").decode("utf-16")  # JSON spells one character as two escapes
    if kind not in _CORE or not _CORE[kind][0].match(text):
        raise ValueError
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    return float(text.replace(".", "", 1) if text[-1] in "fFnN" else text)


# ---------------------------------------------------------------------------------------------------------------------
# From nodes to values, keeping where each came from


class _Origin(NamedTuple):
    """Where a value was written: its file and line as in Problem, and its text if it is a scalar."""

    file: str
    line: int | None
    text: str | None


@dataclass
class _Draft:
    """A recipe being read: its values so far, where each came from by path, and what is wrong so far."""

    file: str
    numbered: bool = True
    values: Any = None
    origins: dict[KeyPath, _Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unread: set[KeyPath] = field(default_factory=set)  # has its problem already; what stands there is a placeholder
    _count: int = 0

    def add(self, path: KeyPath, message: str, hint: str = "", line: int | None = None) -> None:
        """Note a problem at a path; it is reported where that path, or its nearest parent, was written."""
        nearest = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in self.origins), None)
        origin = _Origin(self.file, 1 if self.numbered else None, None) if nearest is None else self.origins[nearest]
        if line is not None:
            origin = _Origin(self.file, line if self.numbered else None, None)
        self.problems.append(Problem(origin.file, origin.line, _dotted(path), message, hint))

    def read(self, text: str) -> None:
        """Fill `values` from YAML text. Leaves None after a syntax error, which hides what follows it."""
        try:
            loader = _Loader(text)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self.add((), f"not text: control character U+{ord(text[error.position]):04X}", line=line)
            return
        try:
            root = loader.get_single_node()
            if root is not None:
                self.values = self._build(root, (), root.start_mark.line + 1)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.add((), *_syntax(error, self.numbered), line=mark.line + 1 if mark else 1)
        except ValueError as error:  # PyYAML lets a code point or a version number that is too large fail in Python
            self.add((), f"not valid YAML: {error}", line=loader.line + 1)
        finally:
            loader.dispose()

    def _build(self, node: yaml.Node, path: KeyPath, line: int) -> Any:
        self._count += 1
        if self._count > MAX_VALUES or len(path) > MAX_DEPTH:
            bound = f"{MAX_DEPTH} levels" if len(path) > MAX_DEPTH else f"{MAX_VALUES} values"
            raise _OutOfBounds(problem=f"aliases expand to more than {bound}", problem_mark=node.start_mark)
        kind = node.tag.removeprefix(_TAG)
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        self.origins[path] = _Origin(self.file, line if self.numbered else None, text)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._build_mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self._build(each, (*path, i), each.start_mark.line + 1) for i, each in enumerate(node.value)]
        try:
            if text is None:  # a list or mapping with a tag of its own, `!!set`
                raise ValueError
            return _scalar(kind, text)
        except ValueError:
            shown = node.tag.replace(_TAG, "!!")
            message = f"unknown tag `{shown}`"
            if kind == "str":
                message = f"{_quoted(text or '')} holds half of a character, an escaped surrogate"
            elif kind in _CORE:
                message = f"{_quoted(text or '')} cannot be read as `{shown}`"
            self.add(path, message, line=node.start_mark.line + 1)
            self.unread.add(path)
            return None

    def _build_mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            try:
                if not isinstance(key_node, yaml.ScalarNode):
                    raise ValueError
                key = _scalar("str", key_node.value)  # `1: x` has the key "1": every knob is named by text
            except ValueError:
                self.add(path, "a key must be text", line=line)
                continue
            inner = (*path, key)
            if key in values:
                first = self.origins[inner].line
                seen = f", first set on line {first}" if first else ""
                self.add(inner, f"duplicate key `{_dotted(inner)}`{seen}", "keep one of them", line)
                continue
            values[key] = self._build(value_node, inner, line)
        return values

    def override(self, text: str) -> None:
        """Apply one `key=value`."""
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        given = _Draft(f"--set {_clip(key if equals else text)}", numbered=False)
        if not equals or not all(part and part.isprintable() for part in parts):
            given.add((), "expected key=value", "e.g. `--set training.learning_rate=1e-4`")
        else:
            given.read(value)
        if not given.problems:
            self._place(parts, given)
        self.problems += [dataclasses.replace(problem, key=_clip(key)) for problem in given.problems]

    def _place(self, parts: list[str], given: "_Draft") -> None:
        """Put an override's value where its key leads, making the sections on the way that the recipe left out."""
        at: Any = self.values
        path: KeyPath = ()
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            try:
                index = _index(at, part)
            except ValueError as error:
                return given.add((), f"`{_dotted(path)}` {error}")
            if isinstance(index, int) and not _holds(at, index):
                at.append(None)
            path = (*path, index)
            if following is None:
                at[index] = given.values
                self.origins = {old: origin for old, origin in self.origins.items() if old[: len(path)] != path}
                self.origins |= {path + inner: origin for inner, origin in given.origins.items()}
            elif not _holds(at, index) or at[index] is None:
                at[index] = [] if following.isdecimal() else {}
            self.origins.setdefault(path, _Origin(given.file, None, None))
            at = at[index]
        return None

    def validate(self) -> Config | None:
        """The Config these values make; None, and problems, where they make none."""
        for name, info in Config.model_fields.items():
            if self.values.get(name) is None and alternatives(info.annotation) == ["section"]:
                self.values[name] = {}  # a section left empty, or out, is one with nothing set
        try:
            return Config.model_validate(self.values)
        except ValidationError as error:
            self._explain(error.errors(include_url=False))
            return None

    def _explain(self, errors: Sequence[ErrorDetails]) -> None:
        """Put pydantic's findings into plain words, one problem for each thing that is wrong."""
        # Each branch of a union fails on its own: of the errors of one value keep the one that got furthest into it,
        # and a limit that was passed before a type that was not met.
        best: dict[KeyPath, tuple[tuple[int, bool], KeyPath, ErrorDetails]] = {}
        meant: list[str] = []  # what unknown keys stand for: a knob that is misspelt is not also missing
        for details in errors:
            path, group = _walk(details["loc"], self.values)
            if details["type"] == "extra_forbidden":
                path = details["loc"]
                target, hint = _did_you_mean(path)
                meant += [f"{target}."] if target else []
                self.add(path, f"unknown key `{_dotted(path)}`", hint)
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
                    self.add((*path, *_parts(found.key)), found.message, found.hint)
            elif details["type"] == "missing":
                if not f"{_dotted(path)}.".startswith(tuple(meant)):
                    self.add(path, f"missing `{_dotted(path)}`", _meaning(path))
            elif path not in self.unread:
                origin = self.origins.get(path)
                self.add(path, *_complaint(path, details, origin.text if origin else None))


# ---------------------------------------------------------------------------------------------------------------------
# Words


def _fail(file: str, message: str, hint: str = "", line: int | None = None) -> NoReturn:
    raise RecipeError(Problem(file, line, "", message, hint)) from None


def _complaint(path: KeyPath, details: ErrorDetails, text: str | None) -> tuple[str, str]:
    """What is wrong with one value, as (message, hint)."""
    key, got, context = f"`{_dotted(path)}`", _got(details["input"], text), details.get("ctx", {})
    for limit in LIMITS.keys() & context:
        return f"{key} must be {LIMITS[limit]} {_number(context[limit])}, got {got}", ""
    if details["type"] == "finite_number":
        return f"{key} must be finite, got {got}", ""
    if details["type"] in ("too_short", "string_too_short"):
        return f"{key} must not be empty", ""
    annotation = _annotation(path)
    expected = " or ".join(_with_article(kind) for kind in alternatives(annotation))
    return f"{key} expects {expected}, got {got}", _mend(annotation, details["input"], text)


def _not_a_recipe(values: Any) -> tuple[str, str]:
    hint = "it needs at least `model: {model_name_or_path: ...}` and `data: {datasets: [{path: ...}]}`"
    if values is None:
        return "the recipe is empty", hint
    return f"a recipe is a mapping of sections, this is {_got(values, None)}", hint


def _syntax(error: yaml.MarkedYAMLError, numbered: bool) -> tuple[str, str]:
    """PyYAML's complaint as (message, hint), the common ones in terms of what was typed."""
    problem = error.problem or error.context or "unreadable"
    if isinstance(error, _OutOfBounds):
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


def _unopened(path: Path, error: Exception) -> tuple[str, str]:
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


def _clip(text: str) -> str:
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def _quoted(text: str) -> str:
    return f"`{_clip(text)}`"


def _dotted(path: KeyPath) -> str:
    return ".".join(_clip(str(part)) for part in path)


def _number(value: float) -> str:
    return str(int(value) if value == int(value) else value)


def _parts(key: str) -> KeyPath:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _with_article(words: str) -> str:
    return f"a {words}" if words.startswith(("number", "whole", "list", "mapping", "section")) else words


def _got(value: Any, text: str | None) -> str:
    """What was written, and what YAML took it for where that may surprise."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing" if not text else f"`{text}` (nothing)"
    shown = _quoted(text if text is not None else str(value))
    return f"the text {shown}" if isinstance(value, str) else shown


def _mend(annotation: Any, value: Any, text: str | None) -> str:
    """How to turn a value of the wrong kind into one of the right kind, if that can be told."""
    kinds = alternatives(annotation)
    if isinstance(value, str):
        choices = list(_choices(annotation))
        close = difflib.get_close_matches(value.lower(), choices, n=1, cutoff=0.5)
        if close:
            return f"did you mean `{close[0]}`?"
        if "true or false" in kinds and value.lower() in ("yes", "y", "on", "no", "n", "off", "true", "false"):
            return f"write `{'true' if value.lower() in ('yes', 'y', 'on', 'true') else 'false'}`, without quotes"
        plain = value.replace("_", "")
        if any(kind in kinds and _CORE[core][0].match(plain) for kind, core in NUMBERS.items()):
            return f"write `{plain}`, without quotes"
    if isinstance(value, float) and "whole number" in kinds and value.is_integer() and abs(value) < 1e15:
        return f"write `{int(value)}`"
    if text and isinstance(value, bool | int | float) and "text" in kinds:
        return f'put it in quotes: "{_clip(text)}"'
    if isinstance(value, str) and "list of text" in kinds:
        return f"write `[{_clip(value)}]`"
    if isinstance(value, dict) and "list of sections" in kinds:
        return "start each entry with `- `"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# What a path means in Config


def _walk(loc: KeyPath, values: Any) -> tuple[KeyPath, KeyPath]:
    """Where in the values an error is: (its path, the path of the union that it is in, else its own).

    Pydantic's `loc` also names branches of unions, (lora, target_modules, list[str], 0), which are not in the values.
    """
    path: KeyPath = ()
    union: KeyPath | None = None
    for part in loc:
        if _holds(values, part) and _annotation((*path, part)) is not None:
            values, path = values[part], (*path, part)
        elif union is None:
            union = path
    return path, path if union is None else union


def _holds(values: Any, part: str | int) -> bool:
    if isinstance(values, dict):
        return part in values
    return isinstance(values, list) and isinstance(part, int) and part < len(values)


def _index(values: Any, part: str) -> str | int:
    """The index or key that a part of an override's key is; one past the end of a list is an index. Raises ValueError
    with the rest of a sentence that starts with the name of the values."""
    if isinstance(values, dict):
        return part
    if not isinstance(values, list):
        raise ValueError(f"has nothing inside it: it is {_got(values, None)}")
    if not re.fullmatch(r"[0-9]{1,4}", part) or int(part) > len(values):
        size = f"{len(values)} {'entry' if len(values) == 1 else 'entries'}"
        raise ValueError(f"has {size}, counted from 0: `{part}` is none of them, nor the next")
    return int(part)


def _annotation(path: KeyPath) -> Any:
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


def _choices(annotation: Any) -> Iterator[str]:
    """Every word that an annotation's Literals allow."""
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    else:
        for arg in get_args(annotation):
            yield from _choices(arg)


@cache
def _fields() -> dict[str, FieldInfo]:
    return dict(fields_of(Config))


def _general(path: KeyPath) -> str:
    """The key of `fields_of` for a path: data.datasets.0.path -> data.datasets[].path."""
    return "".join("[]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _meaning(path: KeyPath) -> str:
    """The first sentence of a field's description."""
    return (_fields()[_general(path)].description or "").partition(". ")[0].removesuffix(".")


def _did_you_mean(path: KeyPath) -> tuple[str, str]:
    """For an unknown key: (the dotted key that was probably meant or "", a hint or "")."""
    name, parent = str(path[-1]), path[:-1]
    if name in NEEDLESS:
        return "", NEEDLESS[name]
    siblings = [key.rpartition(".")[2] for key in _fields() if key.rpartition(".")[0] == _general(parent)]
    close = difflib.get_close_matches(name.lower(), siblings, n=1, cutoff=0.7)
    sibling = _dotted((*parent, close[0])) if close else ""
    if "[]" in _general(parent):  # a row's names (path, name, split) mean other things elsewhere: only its own will do
        sibling = _dotted((*parent, RENAMED_IN_ROW[name])) if name in RENAMED_IN_ROW else sibling
        return sibling, f"did you mean `{sibling}`?" if sibling else ""
    sections = {key.rpartition(".")[2]: key for key in _fields() if "[]" not in key}
    dotted = difflib.get_close_matches(name.lower(), sections.values(), n=1, cutoff=0.8) if "." in name else []
    if dotted:
        section, _, leaf = dotted[0].rpartition(".")
        return dotted[0], f"nest it: `{leaf}` under `{section}:`"
    further = difflib.get_close_matches(name.lower(), sections, n=1, cutoff=0.8)
    target = sections.get(name) or RENAMED.get(name) or sibling or (sections[further[0]] if further else "")
    return target, f"did you mean `{target}`?" if target else ""
