"""What a step of a large model would take with a `memory` section as it is given, which no plan has a say in.

    python benchmarks/simulated.py                 the README's table, into benchmarks/results
    python benchmarks/simulated.py llama3.3-70b 16x4096 layers_on_device=0 activations=host embeddings=host

r=16 on all linear layers, 8-bit AdamW. The CUDA context, about 0.5 GB, is on top.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from qlora.bench.environment import surroundings, today
from qlora.bench.shapes import known, shape_of
from qlora.bench.work import Work
from qlora.config import Config
from qlora.plan.periodic import Simulator
from qlora.plan.types import Usage

AWAY: dict[str, Any] = {"layers_on_device": 0, "activations": "host", "embeddings": "host"}
ON_FILE: dict[str, Any] = AWAY | {"layers_on_host": 0, "activations": "file", "adapters": "host"}
CASES: list[tuple[str, str, str, dict[str, Any]]] = [  # for people, shape, work, memory
    ("70B, 16 x 4096 tokens a step, layers on the host, adapters on the card", "llama3.3-70b", "16x4096", AWAY),
    ("70B, the same, layers and activations on file, adapters on the host", "llama3.3-70b", "16x4096", ON_FILE),
    (
        "8B, one sequence of 235,000 tokens, in tiles of 8192, hidden states on the host",
        "llama3.1-8b",
        "1x235000",
        AWAY | {"adapters": "host", "layer_tile_tokens": 8192},
    ),
]


def simulated(shape: str, work: Work, memory: dict[str, Any]) -> Usage:
    """One step."""
    config = Config.model_validate(
        {
            "model": {"model_name_or_path": shape},
            "data": {"datasets": [{"path": "unused.jsonl"}], "max_seq_length": work.tokens},
            "training": {"per_device_train_batch_size": work.rows, "gradient_accumulation_steps": work.k},
            "memory": {"micro_batch_tokens": 0} | memory,
        }
    )
    return Simulator(config, AutoConfig.for_model(**shape_of(shape)), work.tokens).usage(config.memory)


def table(rows: list[tuple[str, Usage]]) -> str:
    """Markdown."""
    head = "simulated, r=16 on all linear layers, 8-bit AdamW; the CUDA context, about 0.5 GB, is on top"
    lines = [f"| {head} | VRAM | host | disk |", "|---|---|---|---|"]
    for title, usage in rows:
        places = (usage.peak_bytes, usage.host_bytes, usage.file_bytes)
        figures = [f"{n / 1e9:.1f} GB" if n < 1e11 else f"{n / 1e9:.0f} GB" for n in places]
        lines.append(f"| {title} | {' | '.join(text if n else '' for text, n in zip(figures, places, strict=True))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", help=f"one of {', '.join(known())}; without, the README's table")
    parser.add_argument("work", nargs="?", default="1x4096", metavar="KxTOKENS")
    parser.add_argument("memory", nargs="*", metavar="key=value", help="of the recipe's memory section")
    asked = parser.parse_intermixed_args()
    memory = {key: yaml.safe_load(value) for key, _, value in (each.partition("=") for each in asked.memory)}
    disable_progress_bar()
    warnings.simplefilter("ignore")
    around = {"date": today(), **surroundings()}
    cases = CASES if asked.shape is None else [("", asked.shape, asked.work, memory)]
    rows, entries = [], []
    for title, shape, text, section in cases:
        started = time.perf_counter()
        usage = simulated(shape, Work.parse(text), section)
        seconds = time.perf_counter() - started
        rows.append((title, usage))
        named = ("device", "host", "file", "moment", "flops", "moved", "tokens")
        figures = {name: getattr(usage, name) for name in named}
        entries.append({"shape": shape, "work": text, "memory": section, "seconds": seconds} | figures)
        print(f"{shape} {text}: {usage.peak_bytes / 1e9:.2f} GB, {usage.moment}; {seconds:.0f} s")
        for where in ("device", "host", "file"):
            held = sorted(getattr(usage, where).items(), key=lambda item: -item[1])
            print(f"  {where:7}" + ", ".join(f"{name} {nbytes / 2**30:.2f}" for name, nbytes in held if nbytes > 2**20))
    if asked.shape is None:
        out = Path(__file__).parent / "results" / f"simulated_{today()[:10]}.json"
        out.write_text(json.dumps(around | {"table": table(rows), "steps": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
