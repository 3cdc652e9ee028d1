"""What a step of a large model would take with a `memory` section as it is given, which no plan has a say in.

usage: python benchmarks/simulated.py SHAPE KxTOKENS [--layers N] [--out FILE] [memory.key=value ...]

    python benchmarks/simulated.py llama3.3-70b 16x4096 layers_on_device=0 activations=host embeddings=host
    python benchmarks/simulated.py llama3.1-8b 1x235000 layers_on_device=0 activations=host embeddings=host \
        adapters=host layer_tile_tokens=8192

SHAPE is a file in benchmarks/shapes; r=16 on all linear layers, 8-bit AdamW. The CUDA context, about 0.5 GB, is on top.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import yaml
from common import surroundings
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from qlora.config import Config
from qlora.plan.periodic import Simulator
from qlora.plan.types import Usage

SHAPES = Path(__file__).parent / "shapes"


def usage(shape: str, micro_batches: str, memory: dict[str, Any], layers: int | None) -> tuple[Usage, Config]:
    """Simulate one step. micro_batches: as on the command line."""
    facts = json.loads((SHAPES / f"{shape}.json").read_text())
    if layers is not None:
        facts["num_hidden_layers"] = layers
    k, tokens = map(int, micro_batches.split("x"))
    config = Config.model_validate(
        {
            "model": {"model_name_or_path": shape},
            "data": {"datasets": [{"path": "unused.jsonl"}], "max_seq_length": tokens},
            "training": {"gradient_accumulation_steps": k},
            "memory": {"micro_batch_tokens": 0} | memory,
        }
    )
    return Simulator(config, AutoConfig.for_model(**facts), tokens).usage(config.memory), config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(path.stem for path in SHAPES.glob("*.json")))
    parser.add_argument("micro_batches", metavar="KxTOKENS")
    parser.add_argument("memory", nargs="*", metavar="key=value", help="of the recipe's memory section")
    parser.add_argument("--layers", type=int, help="so many instead of all")
    parser.add_argument("--out", type=Path, help="add the figures to this JSON file")
    asked = parser.parse_intermixed_args()
    memory = {key: yaml.safe_load(value) for key, _, value in (each.partition("=") for each in asked.memory)}
    disable_progress_bar()
    warnings.simplefilter("ignore")
    around = surroundings(warm_up=0)
    started = time.perf_counter()
    found, config = usage(asked.shape, asked.micro_batches, memory, asked.layers)
    seconds = time.perf_counter() - started
    print(f"peak {found.peak_bytes / 1e9:.2f} GB ({found.peak_bytes / 2**30:.2f} GiB), {found.moment}; {seconds:.0f} s")
    for where in ("device", "host", "file"):
        held = sorted(getattr(found, where).items(), key=lambda item: -item[1])
        print(f"  {where:7}" + ", ".join(f"{name} {nbytes / 2**30:.2f}" for name, nbytes in held if nbytes > 2**20))
    if asked.out is not None:
        entries = json.loads(asked.out.read_text()) if asked.out.exists() else []
        asked_for = {"shape": asked.shape, "micro_batches": asked.micro_batches, "layers": asked.layers}
        entries.append(
            around
            | asked_for
            | {"memory": config.memory.model_dump(), "seconds": seconds, "peak_bytes": found.peak_bytes}
            | {name: getattr(found, name) for name in ("device", "host", "file", "moment", "flops", "moved", "tokens")}
        )
        asked.out.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
