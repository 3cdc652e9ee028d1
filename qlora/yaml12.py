"""YAML 1.2, core schema (section 10.3.2 of its specification), on PyYAML, whose own schema is that of 1.1.

`1e-5` is a number; `no`, `on` and `2024-01-01` are text; `010` is ten; there are no merge keys and no tags beyond the
core ones. The loader composes nodes, which know their lines; `scalar` gives the value of one.
"""

import re
from typing import Any

import yaml

__all__ = ["CORE", "MAX_DEPTH", "TAG", "Dumper", "Loader", "OutOfBounds", "scalar"]

MAX_DEPTH = 32  # the deepest knob is at 4
TAG = "tag:yaml.org,2002:"
# What unquoted text is: the first of these that it matches, else text.
CORE = {
    "null": re.compile(r"(?:null|Null|NULL|~|)\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    "float": re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}


class OutOfBounds(yaml.MarkedYAMLError):
    """YAML that is well formed and more than any recipe needs."""


class Loader(yaml.SafeLoader):
    """Composes nodes whose plain scalars are resolved by the core schema."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth >= MAX_DEPTH:  # before Python's own recursion limit
            mark = self.peek_event().start_mark
            raise OutOfBounds(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """Quotes any text that YAML 1.2 or 1.1 would take for something else, so that every reader sees text. Long text
    with line breaks, a chat template, stands as a block."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML loses U+0085 from every style but double quotes, which escape what cannot be seen.
        plain = data.replace("\n", "").isprintable()
        return self.represent_scalar(f"{TAG}str", data, style=("|" if "\n" in data else None) if plain else '"')


Loader.yaml_implicit_resolvers = {}  # in place of PyYAML's table for YAML 1.1
for _kind, _pattern in CORE.items():
    Loader.add_implicit_resolver(TAG + _kind, _pattern, None)  # None: whatever the text starts with
    Dumper.add_implicit_resolver(TAG + _kind, _pattern, None)
Dumper.add_representer(str, Dumper.represent_str)


def scalar(kind: str, text: str) -> Any:
    """The value of a scalar. Raises ValueError when an explicit tag does not fit its text, when an int is too long, or
    when text has half of a surrogate pair, which no file or terminal can hold."""
    if kind == "str":
        return text.encode("utf-16", "surrogatepass").decode("utf-16")  # JSON spells one character as two escapes
    if kind not in CORE or not CORE[kind].match(text):
        raise ValueError
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    return float(text.replace(".", "", 1) if text[-1] in "fFnN" else text)
