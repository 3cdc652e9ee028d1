"""What the files of a model or an adapter may say, looked at before a library acts on it.

They come from anyone. Beside weights there are JSON files, some keys of which make transformers or PEFT import a
module, download a kernel, or build as much as a number says. Those are refused here, by name; files that are links to
elsewhere, too. What is read through: Source (source.py), load_adapter (adapters.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlora.errors import ModelError, QLoRAError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_MOST_JSON = 64 << 20  # bytes; a tokenizer_config.json with 100,000 added tokens has 20 MB
_MOST_DEPTH = 64
_READ = re.compile(
    r"(?:adapter_|added_tokens|additional_chat_templates|chat_template|config\.|generation_config|merges|model"
    r"|sentencepiece|special_tokens_map|spiece|tekken|tokenizer|vocab).*|.*\.safetensors"
)
# Where a checkpoint says which attention or experts to compute with: names of transformers' own, or repositories whose
# code is downloaded and run.
_IMPLEMENTATION = re.compile(r"_?(?:attn|experts)_implementation(?:_internal)?")
_OWN = {"eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm"}
_FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_3", "flash_attention_4": "flash_attn"}
_ELSEWHERE = {"gguf_file", "vocab_file", "merges_file", "spm_file", "fast_tokenizer_files"}
# Numbers of parts that are built one by one. The largest known have 126 layers and 512 experts.
_PARTS = re.compile(r"(?:.*[._])?(?:layers?|experts?|heads?|(?:block|expert|head)_count|head_count_kv|num_labels)")
_MOST_PARTS = 1024


def refuse_pickle(path: Path, error: type[QLoRAError] = ModelError) -> None:
    """Raise `error` where a file is, by its name, a pickle: opening one can run what is in it."""
    if path.suffix.lower() in PICKLES:
        raise error(
            f"{path}: pickled weights, which can carry code; never opened\n"
            "  give the model as safetensors (convert it where you trust it) or GGUF"
        )


def inspect(
    directory: Path,
    names: tuple[str, ...] = CONFIGS,
    error: type[QLoRAError] = ModelError,
    trust_remote_code: bool = False,
) -> None:
    """Look through a directory before a library reads it. Raises `error` for what is refused, with file and key."""
    refuse_links(directory, error)
    for name in names:
        if (directory / name).is_file():
            check_config(read_json(directory / name, error), directory / name, error, trust_remote_code)


def refuse_links(directory: Path, error: type[QLoRAError] = ModelError) -> None:
    """Raise `error` where a file that would be read is a link out of the directory; the hub's cache links to its own
    `blobs`."""
    home = directory.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    try:
        links = [path for path in directory.iterdir() if path.is_symlink() and _READ.fullmatch(path.name)]
        for path in links:
            if path.suffix != ".gguf" and not any(path.resolve().is_relative_to(place) for place in allowed):
                raise error(
                    f"{path}: a link to {path.resolve()}, outside its directory\n  copy the file there, if you trust it"
                )
    except (OSError, RuntimeError) as problem:
        raise error(f"{directory}: cannot be read: {problem}") from problem


def member(directory: Path, name: Any, where: Path, error: type[QLoRAError] = ModelError) -> Path:
    """The file of this name in a directory. Raises `error` for a name that leads elsewhere. where: who names it."""
    plain = isinstance(name, str) and name.isprintable() and len(name.encode()) <= 255
    if not plain or name in ("", ".", "..") or re.search(r"[/\\:]", name):
        raise error(f"{where}: names files outside its directory: {str(name)[:300]!r}")
    return directory / name


def read_json(path: Path, error: type[QLoRAError] = ModelError) -> dict[str, Any]:
    """A JSON object from a file. Raises `error` where it is none, or larger or deeper than any of its kind."""
    try:
        if (size := path.stat().st_size) > _MOST_JSON:
            raise ValueError(f"it has {size:,} bytes")
        found = json.loads(path.read_bytes().decode(), parse_constant=_constant)
        if not isinstance(found, dict):
            raise ValueError("not an object")
        for depth, _, _ in _walk(found):
            if depth > _MOST_DEPTH:
                raise ValueError(f"nested more than {_MOST_DEPTH} deep")
        return found
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path}: cannot be read as JSON: {str(problem) or type(problem).__name__}") from problem


def check_config(
    facts: dict[str, Any], where: Path, error: type[QLoRAError] = ModelError, trust_remote_code: bool = False
) -> None:
    """Raise `error` where a configuration, at any depth, asks for code that the recipe does not trust, for files
    elsewhere, or for absurdly many parts."""
    for _, key, value in _walk(facts):
        if _IMPLEMENTATION.fullmatch(key) and not trust_remote_code:
            named = value.values() if isinstance(value, dict) else [value]
            for name in named:
                if name is not None and not (isinstance(name, str) and (name in _OWN or name in _FLASH)):
                    raise error(
                        f"{where}: `{key}` is {name!r}, not transformers' own but code that would be "
                        "downloaded and run; refused"
                    )
        elif key in ("use_kernels", "kernel_config") and value and not trust_remote_code:
            raise error(f"{where}: `{key}` would have kernels downloaded and run; refused")
        elif key in _ELSEWHERE and isinstance(value, str):
            member(where.parent, value, where, error)
        elif isinstance(value, int) and value > _MOST_PARTS and _PARTS.fullmatch(key):
            raise error(f"{where}: `{key}` is {value:,}; no model has more than {_MOST_PARTS:,}")


def check_implementation(name: str, trust_remote_code: bool) -> None:
    """Raise ModelError where the recipe's `model.attn_implementation` means downloaded code that it does not trust."""
    package = _FLASH.get(name)
    # Without the package transformers takes it from a repository, where the `kernels` package is there to do that.
    fetched = package is not None and find_spec("kernels") is not None and find_spec(package) is None
    if not trust_remote_code and (fetched or re.search(r"[/:@\\]", name)):
        raise ModelError(
            f"model.attn_implementation: {name} would be downloaded from a repository and run\n"
            f"  take `sdpa`{f', install {package}' if package else ''}, or set `model.trust_remote_code: true` if you "
            "trust it"
        )


@contextmanager
def foreign(doing: str, error: type[QLoRAError] = ModelError) -> Iterator[None]:
    """Around a library's call alone: whatever it cannot digest in a file is `error`, with the cause.

    What libraries raise there has no bound: KeyError, struct.error, RecursionError; tokenizers raises `Exception`
    itself, and a panic in Rust is a BaseException.
    """
    try:
        yield
    except (QLoRAError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as problem:
        said = str(problem).strip() or type(problem).__name__
        raise error(f"{doing}: {said if len(said) < 2000 else said[:2000] + ' ...'}") from problem


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("it has a NaN")
    return float(name)  # state-space models' limits are infinite


def _walk(facts: dict[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """(depth, key, value) of everything; a list's values bear the list's key."""
    left: list[tuple[int, str, Any]] = [(0, "", facts)]
    while left:
        depth, key, value = left.pop()
        yield depth, key, value
        if isinstance(value, dict):
            left.extend((depth + 1, inner, v) for inner, v in value.items())
        elif isinstance(value, list):
            left.extend((depth + 1, key, v) for v in value)
