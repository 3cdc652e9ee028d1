"""Fuzz one of `targets.TARGETS` by coverage: `python -m tests.torture.guided NAME DIRECTORY [-libFuzzer's options]`.

The directory is for the files that the target reads, and for the corpus. libFuzzer ends the process, so it has one of
its own, and fails where that comes to hold 64 MiB more than before the first case. Takes atheris, which no run needs
and not every Python has.
"""

import resource
import sys
from pathlib import Path

import atheris


def main() -> None:
    name, directory, *options = sys.argv[1:]
    corpus = Path(directory, "corpus")
    corpus.mkdir()
    with atheris.instrument_imports(include=["qlora", "yaml"]):
        from tests.torture.targets import TARGETS

        target = TARGETS[name](Path(directory))
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + 64
    options += [f"-rss_limit_mb={most}", f"-artifact_prefix={directory}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], target.parse)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
