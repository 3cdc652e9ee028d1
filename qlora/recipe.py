"""Recipes: YAML text in, a `Config` out, or everything that is wrong with the text, by line.

    text --compose--> nodes --_Draft.build--> values + where each came from --overrides--> Config.model_validate
                         |                         |                            |                   |
                       syntax              duplicate keys, tags          keys that lead nowhere   the rest
                         +-------------------------+----------------------------+-------------------+--> RecipeError

The YAML is that of `yaml12`. A duplicate key is an error, and what an alias may expand to is bounded. What is said of a
mistake is in `complaints`; where it was made is known here.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import yaml
from pydantic import ValidationError

from qlora.complaints import clip, dotted, explain, got, not_a_recipe, quoted, syntax, unopened
from qlora.config import Config
from qlora.errors import Problem, RecipeError
from qlora.knobs import KeyPath, alternatives
from qlora.section import ContradictionError, Section
from qlora.yaml12 import CORE, MAX_DEPTH, TAG, Dumper, Loader, OutOfBounds, scalar

__all__ = ["dump_recipe", "load_recipe", "load_section", "parse_recipe"]

S = TypeVar("S", bound=Section)

MAX_BYTES = 256 * 1024  # a recipe is a page; this keeps a dataset given by mistake from being parsed for minutes
MAX_VALUES = 10_000  # counted after aliases are expanded, so nine lines of aliases cannot ask for a billion values


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe.

    path       a UTF-8 YAML file; paths inside it are left as they are, relative to the current directory
    overrides  `key=value` each, applied in order after the file: the key dotted, an index of a list as a part
               (`data.datasets.0.path=my.jsonl`), the value read as YAML (empty = null)

    Raises RecipeError with every problem of the file and the overrides.
    """
    return parse_recipe(_text_of(path), str(path), overrides)


def load_section(path: str | Path, kind: type[S], instead: Mapping[str, Any] | None = None) -> S:
    """Read another YAML file than a recipe, e.g. a suite of benchmarks: its values make one section.

    instead  values by key, which take the place of the file's

    Raises RecipeError with every problem of the file.
    """
    draft = _Draft(str(path))
    draft.read(_text_of(path))
    if not isinstance(draft.values, dict) and not draft.problems:
        draft.add((), *not_a_recipe(draft.values))
    if not draft.problems:
        draft.values |= instead or {}
        try:
            return kind.model_validate(draft.values)
        except ValidationError as error:
            for each in error.errors(include_url=False):
                contradiction = each.get("ctx", {}).get("error")
                if isinstance(contradiction, ContradictionError):
                    for found in contradiction.found:
                        draft.add((*each["loc"], *found.key.split(".")), found.message, found.hint)
                else:
                    draft.add(each["loc"], f"`{dotted(each['loc'])}`: {each['msg'][0].lower()}{each['msg'][1:]}")
    raise RecipeError(*sorted(draft.problems, key=lambda problem: problem.line or 0))


def parse_recipe(text: str, file: str = "<recipe>", overrides: Sequence[str] = ()) -> Config:
    """`load_recipe` for text already in memory; `file` is the name that problems are reported under."""
    draft = _Draft(file)
    draft.read(text)
    if isinstance(draft.values, dict):
        for override in overrides:
            draft.override(override)
    elif not draft.problems:
        draft.add((), *not_a_recipe(draft.values))
    config = draft.validate() if isinstance(draft.values, dict) else None
    if config is None or draft.problems:
        # Overrides come last: they have no line, and were applied last.
        raise RecipeError(*sorted(draft.problems, key=lambda problem: (problem.line is None, problem.line or 0)))
    return config


def dump_recipe(config: Config) -> str:
    """YAML that `load_recipe` reads back to an equal Config: what is required and what differs from its default."""
    values = config.model_dump(exclude_defaults=True)
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def _text_of(path: str | Path) -> str:
    """What stands in a UTF-8 file, or RecipeError."""
    shown = str(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        _fail(shown, *unopened(Path(path), error))
    if len(raw) > MAX_BYTES:
        _fail(shown, f"is over {MAX_BYTES // 1024} KiB, too large for a recipe", "is it the dataset?")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        _fail(shown, f"not UTF-8 text: byte 0x{raw[error.start]:02x}", "save the file as UTF-8", line)


def _fail(file: str, message: str, hint: str = "", line: int | None = None) -> NoReturn:
    raise RecipeError(Problem(file, line, "", message, hint)) from None


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
        origin = _Origin(self.file, (line or 1) if self.numbered else None, None)
        if line is None:
            parents = (path[:length] for length in range(len(path), -1, -1))
            origin = next((self.origins[parent] for parent in parents if parent in self.origins), origin)
        self.problems.append(Problem(origin.file, origin.line, dotted(path), message, hint))

    def read(self, text: str) -> None:
        """Fill `values` from YAML text. Leaves None after a syntax error, which hides what follows it."""
        try:
            loader = Loader(text)
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
            self.add((), *syntax(error, self.numbered), line=mark.line + 1 if mark else 1)
        except ValueError as error:  # PyYAML lets a code point or a version number that is too large fail in Python
            self.add((), f"not valid YAML: {error}", line=loader.line + 1)
        finally:
            loader.dispose()

    def _build(self, node: yaml.Node, path: KeyPath, line: int) -> Any:
        self._count += 1
        if self._count > MAX_VALUES or len(path) > MAX_DEPTH:
            bound = f"{MAX_DEPTH} levels" if len(path) > MAX_DEPTH else f"{MAX_VALUES} values"
            raise OutOfBounds(problem=f"aliases expand to more than {bound}", problem_mark=node.start_mark)
        kind = node.tag.removeprefix(TAG)
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        self.origins[path] = _Origin(self.file, line if self.numbered else None, text)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._build_mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self._build(each, (*path, i), each.start_mark.line + 1) for i, each in enumerate(node.value)]
        try:
            if text is None:  # a list or mapping with a tag of its own, `!!set`
                raise ValueError
            return scalar(kind, text)
        except ValueError:
            shown = node.tag.replace(TAG, "!!")
            message = f"unknown tag `{shown}`"
            if kind == "str":
                message = f"{quoted(text or '')} holds half of a character, an escaped surrogate"
            elif kind in CORE:
                message = f"{quoted(text or '')} cannot be read as `{shown}`"
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
                key = scalar("str", key_node.value)  # `1: x` has the key "1": every knob is named by text
            except ValueError:
                self.add(path, "a key must be text", line=line)
                continue
            inner = (*path, key)
            if key in values:
                first = self.origins[inner].line
                seen = f", first set on line {first}" if first else ""
                self.add(inner, f"duplicate key `{dotted(inner)}`{seen}", "keep one of them", line)
                continue
            values[key] = self._build(value_node, inner, line)
        return values

    def override(self, text: str) -> None:
        """Apply one `key=value`."""
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        given = _Draft(f"--set {clip(key if equals else text)}", numbered=False)
        if not equals or not all(part and part.isprintable() for part in parts):
            given.add((), "expected key=value", "e.g. `--set training.learning_rate=1e-4`")
        else:
            given.read(value)
        if not given.problems:
            self._place(parts, given)
        self.problems += [dataclasses.replace(problem, key=clip(key)) for problem in given.problems]

    def _place(self, parts: list[str], given: "_Draft") -> None:
        """Put an override's value where its key leads, making the sections on the way that the recipe left out."""
        at: Any = self.values
        path: KeyPath = ()
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            try:
                index = _index(at, part)
            except ValueError as error:
                return given.add((), f"`{dotted(path)}` {error}")
            path = (*path, index)
            if following is None:
                at[index] = given.values
                self.origins = {old: origin for old, origin in self.origins.items() if old[: len(path)] != path}
                self.origins |= {path + inner: origin for inner, origin in given.origins.items()}
            elif at[index] is None:
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
            written = {path: origin.text for path, origin in self.origins.items()}
            for found in explain(error.errors(include_url=False), self.values, written, self.unread):
                self.add(*found)
            return None


def _index(values: Any, part: str) -> str | int:
    """The key or index that a part of an override's key is, after making room for it: any key, or the next index.

    Raises ValueError with the rest of a sentence that starts with the name of the values.
    """
    if isinstance(values, dict):
        values.setdefault(part)
        return part
    if not isinstance(values, list):
        raise ValueError(f"has nothing inside it: it is {got(values, None)}")
    if not re.fullmatch(r"[0-9]{1,4}", part) or int(part) > len(values):
        size = f"{len(values)} {'entry' if len(values) == 1 else 'entries'}"
        raise ValueError(f"has {size}, counted from 0: `{part}` is none of them, nor the next")
    if int(part) == len(values):
        values.append(None)
    return int(part)
