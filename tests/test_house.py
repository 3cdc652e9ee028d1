"""The house: who may import whom. A file imports from floors below its own, or from its own folder without a circle."""

import ast
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qlora"
FLOORS = [
    {
        *("config", "section", "knobs", "recipe", "yaml12", "complaints"),
        *("machine", "durable", "lock", "redact", "errors"),
    },
    {"model"},
    {"data", "train", "evaluate", "export", "report", "library"},
    {"plan", "output", "live", "verified"},  # the first runs the step, with nothing in it
    {"run", "exports", "combining", "bench", "serve"},
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


# --- what is installed

PINS = (PACKAGE.parent / "constraints.txt").read_text()


def test_every_pin_but_torchs_is_exact_and_has_the_hash_of_each_of_its_files():
    pins = re.findall(r"^([^#\s].*?)(?: \\)?((?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?)*)$", PINS, re.MULTILINE)
    bare = [pin for pin, hashes in pins if not hashes]
    assert len(pins) > 60 and len(bare) == 1 and bare[0].startswith("torch==")
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9.]+( ; sys_platform == 'win32')?", pin) for pin, _ in pins)


def test_every_dependency_is_pinned():
    wanted = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    named = [*wanted["project"]["dependencies"], *wanted["build-system"]["requires"]]
    named += [each for extra in wanted["project"]["optional-dependencies"].values() for each in extra]
    names = {re.match(r"[A-Za-z0-9.-]+", each)[0].lower() for each in named} - {"qlora-trainer"}
    assert names <= set(re.findall(r"^([a-z0-9.-]+)==", PINS, re.MULTILINE))


@pytest.mark.parametrize(
    ("said", "status", "shown", "returned"),
    [
        ("No known vulnerabilities found", 0, "audit: no known vulnerabilities in ", 0),
        ("Found 1 known vulnerability in 1 package\njinja2 3.1.6 CVE-1", 1, "jinja2 3.1.6 CVE-1", 2),
        ("rich Dependency not found on the index and could not be audited: rich", 0, "audit skipped for 1 of ", 0),
        ("Traceback\nConnectionError: no route to host", 1, "audit skipped: ConnectionError: no route to host", 0),
    ],
)
@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_a_known_vulnerability_fails_the_audit_and_a_service_out_of_reach_is_said(
    said, status, shown, returned, tmp_path
):
    fake = tmp_path / "pip-audit"
    fake.write_text(f"#!/bin/sh\ncp $2 {tmp_path}/asked\ncat <<'END'\n{said}\nEND\nexit {status}\n")
    fake.chmod(0o755)
    command = ["make", "--no-print-directory", "audit", f"AUDIT={tmp_path}/audit", f"PIP_AUDIT={fake}"]
    ran = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert shown in ran.stdout and ran.returncode == returned
    asked = (tmp_path / "asked").read_text().split()
    assert "jinja2==3.1.6" in asked and len(asked) == len(re.findall(r"^[^#\s]", PINS, re.MULTILINE))


# --- nothing that runs what it reads


PROGRAMS = [*sorted(PACKAGE.rglob("*.py")), *sorted((PACKAGE.parent / "recipes").glob("*.py"))]
PROGRAMS += sorted((PACKAGE.parent / "benchmarks").glob("*.py"))
# multiprocessing is not among them. It pickles too, but what goes through its pipes comes from our own processes,
# which it started itself, and is never on a disk.
PICKLES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.serialization.load"),
    *("pandas.read_pickle", "runpy.run_path", "runpy.run_module"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader"),  # ours is yaml12.Loader
    *("tempfile.mktemp", "shutil.unpack_archive", "importlib.import_module"),
}
METHODS = {"extractall"}  # of an archive, whose members may have any path
KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}  # False, or for the last what the recipe says
# Who imports a module whose name it has at hand, and where the name comes from.
IMPORTS_BY_NAME = {
    "qlora/__init__.py": "a table beside it: what the package offers, on first use",
    "qlora/bench/meters.py": "written out; a package that need not be there",
    "qlora/bench/peers.py": "written out; packages that need not be there, in a process of their own",
}


def dangers(source: str) -> list[str]:
    """What a program could run something with that it reads, as `line: what`."""
    tree = ast.parse(source)
    known = {}  # names as they were imported, in full
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
            known |= {(top := alias.name.split(".")[0]): top for alias in node.names if not alias.asname}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def full(node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return known.get(node.id, node.id)
        return f"{full(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"

    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Name | ast.Attribute):
            names = [full(node)]
            if isinstance(node, ast.Attribute) and node.attr in METHODS:
                found.append(f"{node.lineno}: .{node.attr}")
        found += [
            f"{node.lineno}: {name}"
            for name in names
            if name in CALLS or (isinstance(node, ast.Import | ast.ImportFrom) and name.split(".")[0] in PICKLES)
        ]
        given = []
        if isinstance(node, ast.Call):
            given = [(word.arg, word.value) for word in node.keywords]
        elif isinstance(node, ast.Dict):
            given = [
                (key.value, value)
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            ]
        for name, value in given:
            if name in KEYWORDS:
                harmless = isinstance(value, ast.Constant) and value.value is False
                asked_for = name == "trust_remote_code" and not isinstance(value, ast.Constant)
                if not harmless and not asked_for:
                    found.append(f"{node.lineno}: {name}={ast.unparse(value)}")
    return found


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: str(p.relative_to(PACKAGE.parent)))
def test_no_file_from_outside_can_make_us_run_it(path):
    name = path.relative_to(PACKAGE.parent).as_posix()
    found = dangers(path.read_text())
    if name in IMPORTS_BY_NAME:
        assert found, f"{name} needs no exception"
        found = [each for each in found if not each.endswith(" importlib.import_module")]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        *(f"import {name}" for name in sorted(PICKLES)),
        *("from pickle import loads", "import pickle as p", "def f():\n    from dill import load"),
        *("eval('1')", "exec('1')", "run = eval", "compile('1', '', 'exec')", "__import__('os')"),
        *(
            "import torch\ntorch.load(f)",
            "import torch as t\nt.save(x, f)",
            "from torch import load",
            "torch.hub.load(a)",
        ),
        *("numpy.load(f, allow_pickle=True)", "np.load(f, allow_pickle=flag)", "read(**{'allow_pickle': True})"),
        *("import os\nos.system('ls')", "from os import popen as p", "import os as o\no.popen('ls')"),
        *("subprocess.run('ls', shell=True)", "Popen(x, shell=yes)", "import subprocess as s\ns.getoutput('ls')"),
        *("yaml.load(text)", "yaml.load(text, Loader=L)", "yaml.unsafe_load(t)", "yaml.full_load(t)", "yaml.Loader(t)"),
        *("import importlib\nimportlib.import_module(n)", "from importlib import import_module"),
        *("tempfile.mktemp()", "tarfile.open(f).extractall()", "shutil.unpack_archive(f)"),
        *("load(x, trust_remote_code=True)", "{'trust_remote_code': True}"),
    ],
)
def test_what_could_is_found(source):
    assert len(dangers(source)) >= 1


@pytest.mark.parametrize(
    "source",
    [
        *(
            "model.eval()",
            "re.compile('x')",
            "import torch\ntorch.compile(f)",
            "import safetensors.torch as s\ns.load(b)",
        ),
        *(
            "json.load(f)",
            "subprocess.run(['ls'], shell=False)",
            "load(x, trust_remote_code=section.trust_remote_code)",
        ),
        *("load(x, trust_remote_code=False)", "yaml.safe_load(t)", "import multiprocessing", "os.replace(a, b)"),
    ],
)
def test_what_could_not_is_left_alone(source):
    assert dangers(source) == []
