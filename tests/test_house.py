"""The house: who may import whom. A file imports from floors below its own, or from its own folder without a circle."""

import ast
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qlora"
FLOORS = [
    {"config", "section", "knobs", "recipe", "yaml12", "complaints", "machine", "errors"},
    {"model"},
    {"data", "train", "evaluate", "export", "report", "library"},
    {"plan"},  # it runs the step, with nothing in it
    {"run", "bench"},
    {"cli"},
]
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
# The two that make a program slow to start; no floor-1 file and no command line may wait for them.
HEAVY = {"torch", "transformers", "peft", "datasets", "bitsandbytes", "accelerate"}


def place(path: Path) -> tuple[str, ...]:
    """qlora/model/nf4.py -> ("model", "nf4"); a folder's __init__ -> ("model",)."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


def imports(path: Path) -> set[tuple[str, ...]]:
    """Every file of the package that `path` imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] != "qlora":
                continue
            inside = parts[1:]
            while inside and not (
                (PACKAGE.joinpath(*inside)).is_dir() or PACKAGE.joinpath(*inside).with_suffix(".py").is_file()
            ):
                inside.pop()  # a name in a module
            if inside:
                found.add(tuple(inside))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_from_floors_below_or_from_its_own_folder(path):
    here = place(path)
    for there in imports(path):
        same_room = here[0] == there[0] or (floor(here[0]) == floor(there[0]) == 0)
        assert same_room or floor(there[0]) < floor(here[0]), f"{'.'.join(here)} imports {'.'.join(there)}"


def test_no_circle_of_imports():
    graph = {place(path): imports(path) for path in FILES}
    done: set[tuple[str, ...]] = set()

    def walk(room, trail):
        assert room not in trail, " -> ".join(".".join(r) for r in (*trail, room))
        if room not in done:
            for other in graph.get(room, ()):
                walk(other, (*trail, room))
            done.add(room)

    for room in graph:
        walk(room, ())


def test_every_file_has_its_place_on_a_floor():
    assert {place(path)[0] for path in FILES} <= set().union(*FLOORS)


@pytest.mark.parametrize("name", sorted(FLOORS[0] | {"cli"}))
def test_nothing_heavy_is_imported_before_it_is_needed(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    for node in tree.body:  # not inside functions, and not under TYPE_CHECKING
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
        assert not {each.split(".")[0] for each in names} & HEAVY


def test_no_architecture_is_named_in_the_engine():
    """The engine knows decoders by what they do; the word for one of them in its code would be a special case."""
    named = ("llama", "qwen", "mistral", "gemma", "phi3", "olmo", "neox", "mixtral", "deepseek")
    for path in [*(PACKAGE / "model").glob("*.py"), *(PACKAGE / "train").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name | ast.Attribute):
                word = (node.id if isinstance(node, ast.Name) else node.attr).lower()
                assert not any(name in word for name in named), f"{path}:{node.lineno}: {word}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 40:
                assert not any(name in node.value.lower() for name in named), f"{path}:{node.lineno}: {node.value}"


def test_every_folder_is_in_the_package_that_is_built():
    listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(("qlora", *path.relative_to(PACKAGE).parent.parts)) for path in PACKAGE.rglob("*.py")}
    assert set(listed["packages"]) == folders | set(listed["package-dir"])
    assert all((PACKAGE.parent / folder).is_dir() for folder in listed["package-dir"].values())
