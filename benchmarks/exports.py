"""What adapters lose on their way out, and how long it takes to change from one to the other.

    python benchmarks/exports.py outputs/quickstart outputs/appointments    the README's table, into benchmarks/results

Each adapter is merged into both kinds of weights and measured (`certificate.json`), then exported in every form, loaded
anew by transformers, PEFT and llama.cpp, and asked its held-out questions (`verified.json`). Last, all of them stand on
one base, and each is switched to in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qlora.bench.environment import surroundings, today
from qlora.export.certificate import CERTIFICATE
from qlora.exports import KINDS, export
from qlora.live import Live
from qlora.verified import FILE

ROUNDS = 17  # through all adapters and the base


def exported(adapter: Path) -> dict[str, Any]:
    """The certificate of both merges, and how each export answers."""
    with TemporaryDirectory(dir=".", prefix=".exports-") as scratch:
        both, all_of_them = Path(scratch) / "both", Path(scratch) / "all"
        export(adapter, ["merged"], both)
        started = time.perf_counter()
        export(adapter, KINDS, all_of_them, weights="dequantized", verify=True)
        seconds = time.perf_counter() - started
        certificate = json.loads((both / "merged" / CERTIFICATE).read_bytes())
        return {"certificate": certificate, "seconds": seconds, **json.loads((all_of_them / FILE).read_bytes())}


def switched(adapters: dict[str, Path]) -> list[float]:
    """Milliseconds of each switch, the base's among them."""
    took = []
    with Live.load(adapters) as live:
        for name in [*live.names, None] * ROUNDS:
            started = time.perf_counter()
            live.use(name)
            took.append(1e3 * (time.perf_counter() - started))
    return took


def table(found: dict[str, dict[str, Any]], took: list[float]) -> str:
    """Markdown: how the exports answer, how true the merges are, how long a switch takes."""
    names, all_of = list(found), list(found.values())
    lines = [_row("questions answered right / as by the live adapter", "loaded by", *names)]
    lines += [_row("---", "---", *["---:"] * len(names))]
    live = [one["live"] for one in all_of]
    lines += [_row("live, as it was trained", "", *(f"{at['exact']} of {at['questions']}" for at in live))]
    for kind in KINDS:
        each = [one["exports"][kind] for one in all_of]
        lines += [_row(f"`{kind}`", each[0]["loaded_by"], *map(_answered, each))]
    heads = [f"{name}: {what}" for name in names for what in ("KL", "top-1", "loss")]
    lines += ["", _row("merged into (KL in nats a token)", *heads), _row("---", *["---:"] * len(heads))]
    certificates = [one["certificate"] for one in all_of]
    for weights, said in (("dequantized", "the four-bit weights, dequantized"), ("original", "the original weights")):
        figures = [certificate["candidates"][weights] for certificate in certificates]
        cells = [cell for f in figures for cell in (f"{f['kl']:.1e}", f"{f['top1']:.2%}", f"{f['loss']:.4f}")]
        lines += [_row(said, *cells)]
    for key, said in (("live_loss", "not merged: the live adapter"), ("base_loss", "the base alone")):
        lines += [_row(said, *(cell for one in certificates for cell in ("", "", f"{one[key]:.4f}")))]
    median, slowest = statistics.median(took), max(took)
    who = ", ".join([*names, "the base"])
    return "\n".join([*lines, "", f"Changing between {who}: median {median:.1f} ms, at most {slowest:.1f} ms."])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _answered(one: dict[str, Any]) -> str:
    """Right, as the live adapter, and by how much that preferred its own token, at most, where they differ."""
    of = one["agreement"]
    if one["exact"] is None:
        return f"prompts: {of['rendered']} the same"
    gaps = [each["gap"] for each in of["differences"] if each["gap"] is not None]
    return f"{one['exact']} / {of['equal']}" + (f", gaps up to {max(gaps):.2g}" if gaps else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path, metavar="DIR", help="that `qlora train` left, on one base")
    asked = parser.parse_args()
    around = {"date": today(), **surroundings()}
    adapters = {path.resolve().name: path for path in asked.adapters}
    found = {name: exported(path) for name, path in adapters.items()}
    took = switched(adapters)
    out = Path(__file__).parent / "results" / f"exports_{today()[:10]}.json"
    content = around | {"table": table(found, took), "switch_ms": took, "adapters": found}
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{content['table']}\n\n{out}")


if __name__ == "__main__":
    main()
