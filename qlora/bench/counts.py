"""What a training step of a tiny model takes, in counts that do not depend on the machine's mood.

    python -m qlora.bench.counts            shows them
    python -m qlora.bench.counts --check    exit status 1 where they are not those of benchmarks/counts.json
    python -m qlora.bench.counts --write    accepts them, with the commit that explains them

The step runs on fake tensors, once for each way of it that has a path of its own: an operation, a copy or a buffer too
many shows here in seconds on any machine, where a clock would call it noise.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from qlora.config import Config
from qlora.errors import DataError
from qlora.plan.ledger import Ledger
from qlora.plan.simulate import record

FILE = Path(__file__).parents[2] / "benchmarks" / "counts.json"
ACCEPT = "python -m qlora.bench.counts --write"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
MORE = 0.005  # share of a count that may come or go unsaid; of a peak, none
OTHER_VERSIONS = 0.02  # likewise of FLOPs and peak under other versions than the file's, where nothing else is compared
PEAK, FLOPS = "peak bytes", "FLOPs"

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WORK = [(1, 64)] * 2
ON_HOST = {"layers_on_device": 1, "activations": "host", "embeddings": "host", "adapters": "host"}
ON_FILE = {"layers_on_device": 0, "layers_on_host": 0, "activations": "file"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> method, keys of the recipe's `memory` section
    "qlora": ("qlora", {}),
    "qlora, micro-batches apart": ("qlora", {"micro_batch_tokens": 64}),
    "qlora, layers kept": ("qlora", {"layers_kept": 1}),
    "qlora, tiles": ("qlora", {"layer_tile_tokens": 64}),
    "qlora, on the host": ("qlora", ON_HOST | {"micro_batch_tokens": 64}),
    "qlora, on file": ("qlora", ON_FILE | {"micro_batch_tokens": 64}),
    "qlora, standard order": ("qlora", {"order": "standard"}),
    "lora": ("lora", {"micro_batch_tokens": 64}),
    "full": ("full", {"micro_batch_tokens": 64}),
}

Counts = dict[str, int]


class Counting(Ledger):
    """A ledger that counts operations by their names too, and storages as they are born, from its start on."""

    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()
        self.born = 0

    def start(self) -> None:
        super().start()
        self.called.clear()
        self.born = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called[func.__name__.split(".")[0]] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _born(self, tensor: Any) -> None:
        self.born += tensor.untyped_storage()._cdata not in self._records
        super()._born(tensor)


def count(case: str) -> Counts:
    """One of CASES: name of a count -> how many.

    operations    that touch memory; views and allocations do not
    expansions    of four-bit weights
    products      of matrices
    copies        of tensors, between host and device or on one of them
    allocations   storages born
    bytes         read and written on the device; by way, where they move to it, from it, or to and from a file
    peak bytes    on the device, and what they were for; of host memory
    """
    method, memory = CASES[case]
    ledger = Counting()
    usage = record(_config(method, memory), AutoConfig.for_model("llama", **SHAPE), WORK, ledger=ledger).usage()
    work = [item for phase in usage.phases.values() for item in phase.work.items()]
    called = ledger.called
    return {
        "operations": sum(n for _, n in work),
        "expansions": called["dequantize_4bit"],
        "products": sum(called[name] for name in ("mm", "addmm", "bmm")),
        "copies": sum(called[name] for name in ("copy_", "_to_copy", "clone")),
        "allocations": ledger.born,
        FLOPS: usage.flops,
        "bytes": sum(nbytes * n for (_, nbytes), n in work),
        **{f"bytes {way}": n for way, n in sorted(usage.moved.items())},
        PEAK: usage.peak_bytes,
        **{f"{PEAK} of {category}": n for category, n in sorted(usage.device.items())},
        f"host {PEAK}": usage.host_bytes,
    }


def take(cases: Iterable[str] = CASES) -> dict[str, Any]:
    """All that the file holds, as it is now: versions, and the counts of each case."""
    return {"versions": versions(), "counts": {case: count(case) for case in cases}}


def versions() -> dict[str, str]:
    """Of the packages whose operations are counted, without the build."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in PACKAGES}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What has to be mended or written down, a line each; of none, `new` is what `old` says.

    old  the whole file
    new  `take` of any of its cases
    """
    same = old["versions"] == new["versions"]
    found = []
    for case, counts in new["counts"].items():
        known = old["counts"].get(case)
        if known is None:
            found.append(f"{case}: is not in the file")
            continue
        for name in known | counts:
            was, now = known.get(name, 0), counts.get(name, 0)
            if " of " in name or not (same or name in (FLOPS, PEAK)):  # a peak's parts explain it, and are free
                continue
            allowed = OTHER_VERSIONS if not same else 0 if PEAK in name else MORE
            if now > was * (1 + allowed):
                found.append(f"{case}: MORE {name}: {was:,} -> {now:,}{_parts(known, counts) if name == PEAK else ''}")
            elif same and now < was * (1 - allowed):
                found.append(f"{case}: fewer {name}: {was:,} -> {now:,}")
    return found


def read(path: Path) -> dict[str, Any]:
    """The committed counts. Raises DataError."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}\n  to make it:  {ACCEPT}") from None


def _parts(known: Counts, counts: Counts) -> str:
    changed = {
        name.removeprefix(f"{PEAK} of "): counts.get(name, 0) - known.get(name, 0)
        for name in known | counts
        if name.startswith(f"{PEAK} of ")
    }
    return " (" + ", ".join(f"{category} {n:+,}" for category, n in changed.items() if n) + ")"


def _config(method: str, memory: Mapping[str, Any]) -> Config:
    return Config.model_validate(
        {
            "method": method,
            "model": {"model_name_or_path": "tiny", "dtype": "bfloat16"},
            "lora": {"r": 8, "lora_alpha": 16},
            "data": {"datasets": [{"path": "unused.jsonl"}]},
            "training": {"optim": "adamw_torch"},
            "memory": dict(memory),
        }
    )


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qlora.bench.counts", description=(__doc__ or "").split("\n\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help=f"compare with {FILE.name}; exit status 1 where they differ")
    what.add_argument("--write", action="store_true", help=f"write {FILE.name} anew")
    asked = parser.parse_args(words)
    old = read(FILE) if asked.check else {}
    new = take()
    if asked.write:
        FILE.write_text(json.dumps(new, indent=1) + "\n")
        print(f"{len(new['counts'])} cases in {FILE}")
    elif asked.check:
        found = differences(old, new)
        print("\n".join([*found, f"to accept:  {ACCEPT}"] if found else [f"{len(new['counts'])} cases as in {FILE}"]))
        return 1 if found else 0
    else:
        print(json.dumps(new, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
