"""Where suites are: `benchmarks/suites/` of the sources, or any YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.bench.environment import TREE
from qlora.bench.work import Suite
from qlora.errors import Problem, RecipeError
from qlora.recipe import load_section

# An installed wheel has them beside this file.
_INSTALLED = Path(__file__).parent / "_suites"
SUITES = _INSTALLED if _INSTALLED.is_dir() else TREE / "benchmarks" / "suites"


def known() -> list[str]:
    """Names of our own suites."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(name: str, instead: Mapping[str, Any]) -> tuple[str, Suite]:
    """A suite and its name.

    name     of one of our own, or the path of a YAML file
    instead  values by key, which take the place of the suite's

    Raises RecipeError.
    """
    ours, path = SUITES / f"{name}.yaml", Path(name)
    if name in known():
        path = ours
    elif not path.is_file():
        listed = ", ".join(known())
        raise RecipeError(
            Problem(name, None, "", "no such suite", f"there are {listed}; or give a YAML file of your own")
        )
    return path.stem, load_section(path, Suite, instead)
