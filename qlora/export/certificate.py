"""How true a merged model is to the adapter that was trained, measured before anything is written.

    live  the base in four bits, as in training, with the adapter on it
    merged candidates: the adapter in the base's original 16-bit weights, and in its dequantized four-bit weights

Each candidate is loaded as transformers will load it, and predicts every supervised token of held-out rows beside the
live one: KL divergence of their next-token distributions, how often both have the same likeliest token, and the loss.
Which base is better is not known beforehand: the original weights are closer to the model that everyone knows, the
dequantized ones are those that the adapter has learned to correct.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.config import Config
from qlora.errors import AdapterError, MachineError
from qlora.export.merge import Merged, Weights
from qlora.export.writing import check_place, write
from qlora.machine import free_bytes, give_back_memory
from qlora.model.adapters import load_adapter
from qlora.model.batch import Batch, regroup
from qlora.model.blocks import inputs_of
from qlora.model.load import load_base
from qlora.model.nf4 import four_bit_weights, standing
from qlora.model.source import Source
from qlora.redact import redact

__all__ = [
    "CERTIFICATE",
    "LEAST_TOP1",
    "MOST_KL",
    "Certificate",
    "Fidelity",
    "certify",
    "export_merged",
    "with_certificate",
]

CERTIFICATE = "certificate.json"
MOST_KL = 0.05  # nats a token
LEAST_TOP1 = 0.95
_LOGITS = 1 << 26  # values of one model's logits that stand at a time: 256 MiB in fp32
_ROUNDING = 1e-6  # nats a token: fp32 does not tell less from 0, and may come below it
_WIDTH = 100
_TOKENS = 64  # whose distributions are compared at a time

_ABOUT = {
    "original": "the base's original 16-bit weights",
    "dequantized": "the base's four-bit weights, dequantized",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Fidelity:
    """How a merged candidate does beside the live adapter, over the supervised tokens.

    kl    mean KL(live || merged), nats a token
    top1  share of tokens at which both have the same likeliest token, 0..1
    loss  mean cross-entropy of the candidate, nats a token
    """

    kl: float
    top1: float
    loss: float

    @property
    def passes(self) -> bool:
        """Whether it is close enough to be given out without a word."""
        return self.kl <= MOST_KL and self.top1 >= LEAST_TOP1


@dataclasses.dataclass(frozen=True, slots=True)
class Certificate:
    """What was measured. JSON has the same fields.

    rows, tokens  documents, and supervised tokens in them; 0 where nothing was measured
    live_loss     of the base in four bits with the adapter, nats a token
    base_loss     of that base alone
    candidates    by the weights that the adapter was merged into
    written       which of them is in the directory
    """

    rows: int
    tokens: int
    live_loss: float | None
    base_loss: float | None
    candidates: Mapping[str, Fidelity]
    written: str

    @property
    def better(self) -> str | None:
        """The candidate with the lower KL."""
        return min(self.candidates, key=lambda name: self.candidates[name].kl, default=None)

    @property
    def passes(self) -> bool:
        """Whether what is written was measured, and is close enough."""
        return self.written in self.candidates and self.candidates[self.written].passes

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"better": self.better, "passes": self.passes}, indent=1) + "\n"

    def verdict(self) -> str:
        """Which is better and by how much, in a sentence."""
        better = self.better
        if better is None:
            return "Nothing was measured: how true the merged model is to the adapter is not known."
        best = self.candidates[better]
        others = [name for name in self.candidates if name != better]
        if not others:
            return f"Merged into {_ABOUT[better]}: KL {_kl(best)} nats a token from the live adapter."
        other = self.candidates[others[0]]
        told, into = f"{_kl(best)} nats a token", _ABOUT[others[0]]
        against = f"; into {into} it is {_kl(other)}"
        if best.kl >= _ROUNDING:
            against = f", {other.kl / best.kl:.2g} times less than into {into} ({_kl(other)})"
        return f"Closer to the live adapter: merged into {_ABOUT[better]}, with a KL of {told}{against}."

    def block(self) -> str:
        """Markdown for the model card."""
        lines = ["## Fidelity certificate", "", self.verdict()]
        if self.candidates and self.live_loss is not None and self.base_loss is not None:
            lines += [
                "",
                f"Over {self.tokens:,} supervised tokens of {self.rows:,} held-out rows; the live adapter stands on the"
                " base in four bits, as it was trained.",
                "",
                "| | KL from live (nats a token) | same likeliest token | loss |",
                "|---|---|---|---|",
                *(
                    f"| merged into {_ABOUT[name]}{' (**written**)' if name == self.written else ''}"
                    f" | {f.kl:.2e} | {f.top1:.2%} | {f.loss:.4f} |"
                    for name, f in self.candidates.items()
                ),
                f"| live adapter | | | {self.live_loss:.4f} |",
                f"| base alone | | | {self.base_loss:.4f} |",
            ]
            if not self.passes:
                lines += ["", f"**Forced**: beyond the limits of KL {MOST_KL} or {LEAST_TOP1:.0%} of likeliest tokens."]
        return "\n".join([*lines, ""])


def _kl(found: Fidelity) -> str:
    return f"{found.kl:.2g}" if found.kl >= _ROUNDING else f"less than {_ROUNDING:g}"


def with_certificate(card: str, certificate: Certificate) -> str:
    """An adapter's card with the certificate of what it became when merged, before its recipe; in place of another."""
    card = re.sub(r"^## Fidelity certificate\n.*?(?=^## |\Z)", "", card, flags=re.DOTALL | re.MULTILINE)
    before, recipe, after = card.partition("## Recipe\n")
    return f"{before.rstrip()}\n\n{certificate.block()}" + (f"\n{recipe}{after}" if recipe else "")


@torch.no_grad()
def certify(
    live: Any,
    candidates: Mapping[str, Callable[[], PreTrainedModel]],
    batches: Sequence[Batch],
    written: str | None = None,
) -> Certificate:
    """Measure merged candidates against the live adapter.

    live        PEFT's model over the base as it was trained, the adapter unmerged
    candidates  name -> what loads the candidate; one of them is in memory at a time
    batches     held-out micro-batches
    written     which is to be written; None: the better one

    Raises AdapterError where the rows have no supervised token.
    """
    live.eval()
    device = live.device
    vocabulary = live.config.get_text_config().vocab_size
    pieces = [piece for piece in regroup(batches, max(_LOGITS // vocabulary, 1)) if piece.supervised]
    tokens = sum(piece.supervised for piece in pieces)
    if not tokens:
        raise AdapterError("the rows to measure on have no supervised token")
    rows = sum(sum(map(len, batch.documents)) for batch in batches)
    found: dict[str, Fidelity] = {}
    live_loss = base_loss = 0.0
    with _dense(live, device):
        for piece in pieces:
            live_loss += sum(_loss(*each) for each in _predicted(live, piece.to(device)))
            with live.disable_adapter():
                base_loss += sum(_loss(*each) for each in _predicted(live, piece.to(device)))
        for name, load in candidates.items():
            model, sums = load(), torch.zeros(3, dtype=torch.float64)
            for piece in pieces:
                both = zip(_predicted(live, piece.to(device)), _predicted(model, piece.to(model.device)), strict=True)
                for (expected, targets), (logits, _) in both:
                    sums += _compared(expected, logits.to(device), targets)
            found[name] = Fidelity(*(sums / tokens).tolist())
            del model
            give_back_memory(device)
    certificate = Certificate(rows, tokens, live_loss / tokens, base_loss / tokens, found, "")
    return dataclasses.replace(certificate, written=written or str(certificate.better))


def _dense(live: Any, device: torch.device) -> AbstractContextManager[None]:
    """The live model's four-bit weights expanded once, where that leaves room for a candidate; else at each reading."""
    nbytes = sum(weight.dense_nbytes for weight in four_bit_weights(live))
    return standing(live) if free_bytes(device) > 4 * nbytes else nullcontext()


def _predicted(model: Any, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits [N, vocab_size] at the supervised tokens of a micro-batch, and those tokens [N], some at a time."""
    following = torch.full_like(batch.labels, -100)
    following[:, :-1] = batch.labels[:, 1:]
    columns = (following != -100).any(dim=0).nonzero().flatten()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = inputs_of(inner, batch)
    keeps = "logits_to_keep" in inspect.signature(inner.forward).parameters
    vocabulary = inner.config.get_text_config().vocab_size
    most = max(_LOGITS // (len(batch.labels) * vocabulary), 1)
    for some in columns.split(most):
        logits = inner(**inputs, logits_to_keep=some).logits if keeps else inner(**inputs).logits[:, some]
        wanted = following[:, some]
        there = wanted != -100
        yield logits[there], wanted[there]


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Summed cross-entropy, nats."""
    parts = zip(logits.split(_TOKENS), targets.split(_TOKENS), strict=True)
    return sum(torch.nn.functional.cross_entropy(x.float(), t, reduction="sum").item() for x, t in parts)


def _compared(live: torch.Tensor, merged: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sums over tokens: KL(live || merged), same likeliest token, merged's cross-entropy."""
    sums = torch.zeros(3, dtype=torch.float64)
    for p, q, t in zip(live.split(_TOKENS), merged.split(_TOKENS), targets.split(_TOKENS), strict=True):
        same = (p.argmax(dim=1) == q.argmax(dim=1)).sum()
        p, q = p.float().log_softmax(dim=1), q.float().log_softmax(dim=1)
        # A token that a model forbids has a logit of -inf in both: it adds nothing.
        kl = torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum()
        sums += torch.stack([kl, same, -q.gather(1, t[:, None]).sum()]).cpu().double()
    return sums


def export_merged(
    adapter: Path,
    out: Path,
    *,
    config: Config,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch],
    device: torch.device,
    weights: Literal["auto"] | Weights = "auto",
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Certificate:
    """Merge an adapter into its base, measure what comes of it, and write the better one to `out`.

    config   the recipe that the adapter was trained by
    batches  held-out micro-batches to measure on
    device   where the live adapter stands while it is measured
    weights  into which weights to merge; auto: into those that prove better, the dequantized where nothing is measured
    force    write it even where it is not true to the adapter, or that cannot be measured

    Raises AdapterError where it is not true to the adapter or does not belong to the base, MachineError where there is
    too little memory to measure, or disk to write.
    """
    if config.method == "full":
        raise AdapterError(f"{adapter}: every weight was trained: it is a whole model already, nothing is to be merged")
    check_place(out)
    # A base that was not in four bits has no dequantized weights.
    possible: tuple[Weights, ...] = get_args(Weights) if config.method == "qlora" else ("original",)
    wanted = possible if weights == "auto" else (weights,)
    if not set(wanted) <= set(possible):
        raise AdapterError(f"{adapter}: was trained on 16-bit weights; there are none to dequantize")
    merged: dict[Weights, Merged] = {}
    for name in wanted:
        merged[name] = Merged(adapter, source, config, name, device, next(iter(merged.values()), None))
    try:
        certificate = _measured(adapter, merged, config, source, batches, device, say)
    except (MachineError, AdapterError) as error:
        if not force:
            raise
        say(f"{error}\n  it is not measured, as --force says")
        certificate = Certificate(0, 0, None, None, {}, wanted[-1])
    say(textwrap.fill(certificate.verdict(), _WIDTH, subsequent_indent="  "))
    if not certificate.passes and not force:
        found = certificate.candidates[certificate.written]
        raise AdapterError(
            f"{adapter}: merged into {_ABOUT[certificate.written]} it is not the model that was trained"
            f"\n  KL {found.kl:.3g} nats a token (at most {MOST_KL}), {found.top1:.1%} of the likeliest tokens the same"
            f" (at least {LEAST_TOP1:.0%})\n  --force exports it nevertheless; the adapter itself (--to peft) is exact"
        )

    def beside(directory: Path) -> None:
        tokenizer.save_pretrained(directory)
        (directory / CERTIFICATE).write_text(certificate.to_json(), encoding="utf-8")
        (directory / "README.md").write_text(_card(adapter, out, source, certificate), encoding="utf-8")

    write(merged[cast(Weights, certificate.written)], out, beside, say=say)
    return certificate


def _measured(
    adapter: Path,
    merged: Mapping[Weights, Merged],
    config: Config,
    source: Source,
    batches: Sequence[Batch],
    device: torch.device,
    say: Callable[[str], None],
) -> Certificate:
    if not any(batch.supervised for batch in batches):
        raise AdapterError(
            f"{adapter}: there are no held-out rows to measure the merged model on\n"
            "  give some (`data.eval_datasets` of its recipe), or --force to export it unmeasured"
        )
    needed = next(iter(merged.values())).nbytes
    base = load_base(config, source, device, say)
    live = load_adapter(base.model, str(adapter))
    # Beside the live one; where it does not fit on the device, on the host.
    places = [place for place in (device, torch.device("cpu")) if free_bytes(place) > 1.1 * needed]
    if not places:
        raise MachineError(
            f"{adapter}: to be measured the merged model must stand in memory: {needed / 2**30:.1f} GiB,"
            f" {free_bytes(torch.device('cpu')) / 2**30:.1f} GiB are free\n"
            "  --force --weights dequantized merges it unmeasured, tensor by tensor"
        )

    def loader(name: Weights) -> Callable[[], PreTrainedModel]:
        return lambda: merged[name].load(places[0])

    return certify(live, {name: loader(name) for name in merged}, batches)


def _card(adapter: Path, out: Path, source: Source, certificate: Certificate) -> str:
    """The model card of the merged model."""
    base, recipe = redact(source.name), adapter / "recipe.yaml"
    local = source.revision is None
    metadata = {"library_name": "transformers", **({} if local else {"base_model": base}), "tags": ["lora", "qlora"]}
    at = f" at `{source.revision}`" if source.revision else ""
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        f"# {out.absolute().name}",
        "",
        f"`{base}`{at} with the LoRA adapter `{adapter.absolute().name}` merged into {_ABOUT[certificate.written]}.",
        "",
        certificate.block(),
    ]
    if recipe.is_file():
        lines += ["## Recipe", "", "```yaml", redact(recipe.read_text(encoding="utf-8")).strip(), "```", ""]
    return "\n".join(lines)
