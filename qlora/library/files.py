"""An adapter's files: which they are, whether they are what was written, and the name that their content gives."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from stat import S_ISREG

from pydantic import ValidationError

from qlora import durable
from qlora.durable import Damaged, FileRecord
from qlora.errors import AdapterError
from qlora.library.facts import CONFIG, RECIPE, RUN, WEIGHTS, read_facts
from qlora.model.untrusted import read_json, refuse_links

__all__ = ["EDITED", "FILES", "check", "check_recorded", "damage_of", "files_of", "identity", "pieces", "record_of"]

EDITED = ("README.md", RECIPE)  # people write in their cards, and move their rows
# What of a directory is the adapter: not its checkpoints, its log, or what else lies there.
FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "run.json", "README.md"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    "chat_template*",
)


def check(directory: Path) -> None:
    """Raise AdapterError where a directory is not a LoRA adapter that is whole and that could be loaded."""
    from qlora.model.adapters import read_config  # imports torch, which no list of names should wait for

    if not read_config(directory).base_model_name_or_path:
        raise AdapterError(f"{directory}/{CONFIG}: names no base model (`base_model_name_or_path`)")
    read_facts(directory)
    check_recorded(directory, but=("README.md",))  # the card: people write in it


def check_recorded(directory: Path, but: Sequence[str] = EDITED) -> None:
    """Raise AdapterError where an adapter's files, `but` for some, are not those whose hashes its run.json has."""
    recorded = read_json(directory / RUN, AdapterError).get("files") if (directory / RUN).is_file() else None
    for name, record in recorded.items() if isinstance(recorded, dict) else ():
        if name in but:
            continue
        try:
            said = FileRecord.model_validate(record)
        except ValidationError:
            raise AdapterError(f"{directory}/{RUN}: damaged") from None
        if not re.fullmatch(durable.FILE_NAME, name) or not (directory / name).is_file():
            raise AdapterError(f"{directory}: {name} is missing, which its run wrote")
        if record_of(directory / name) != said:
            raise AdapterError(f"{directory}: {name} is not what its run wrote (its SHA-256 differs)")


def files_of(directory: Path) -> dict[str, Path]:
    """The files of an adapter by name. Raises AdapterError for what is no plain file, or a link to elsewhere."""
    if not directory.is_dir():
        raise AdapterError(f"{directory}: {'is not a directory' if directory.exists() else 'no such directory'}")
    if not (directory / CONFIG).is_file():
        raise AdapterError(f"{directory}: not a LoRA adapter: it has no {CONFIG}")
    refuse_links(directory, AdapterError)
    home = directory.resolve()
    allowed = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    # Weights in another form come along for `check` to name what is wrong with them.
    pickles = () if (directory / WEIGHTS).is_file() else ("adapter_model.*",)
    files = {path.name: path for pattern in (*FILES, *pickles) for path in directory.glob(pattern)}
    for name, path in files.items():
        if not any(path.resolve().is_relative_to(place) for place in allowed):
            raise AdapterError(f"{path}: a link to {path.resolve()}, outside its directory\n  copy the file there")
        if not re.fullmatch(durable.FILE_NAME, name) or not S_ISREG(path.stat().st_mode):
            raise AdapterError(f"{path}: not a plain file")
    return dict(sorted(files.items()))


def pieces(path: Path) -> Iterator[bytes]:
    """A file's content; whatever goes wrong with reading it is AdapterError, and no fault of the library's disk."""
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(4 << 20):
                yield piece
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror or error}") from error


def record_of(path: Path) -> FileRecord:
    """A file's size and SHA-256. Raises AdapterError."""
    digest, size = hashlib.sha256(), 0
    for piece in pieces(path):
        digest.update(piece)
        size += len(piece)
    return FileRecord(size=size, sha256=digest.hexdigest())


def identity(files: Mapping[str, FileRecord]) -> str:
    """The name of an object: the SHA-256 over its files' hashes and names, as `sha256sum` prints them."""
    lines = "".join(f"{files[name].sha256}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def damage_of(place: Path, sha256: str) -> str:
    """What is wrong with an object; "" where nothing is."""
    try:
        return "" if identity(durable.verify(place)) == sha256 else "its content is another adapter's"
    except Damaged as damage:
        return f"damaged: {damage}" if place.is_dir() else "its files are gone"
