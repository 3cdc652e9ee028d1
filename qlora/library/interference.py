"""What adapters do to each other in a combination: from their weights alone, and as a report with what was measured.

Of two changes D1 = s1 B1 A1 and D2 = s2 B2 A2 of one weight, each times its adapter's weight in the combination:

    sign conflict   sum of min(|D1|, |D2|) where their signs differ, in parts of that sum over all entries. That is what
                    cancels when they are added: |D1 + D2| = |D1| + |D2| - 2 min(|D1|, |D2|) there. 0: they agree
                    wherever they meet; 0.5: as two have it that know nothing of each other; 1: they are opposed.
                    TIES (arXiv:2306.01708, section 3) counts entries whose signs differ after dropping the small ones;
                    the weighting by min does without a threshold.
    overlap         ||U1^T U2||_F^2 / min(r1, r2), U an orthonormal basis of what a change writes (its columns) or reads
                    (its rows): LoRA, arXiv:2106.09685, section 7.2. 1: one space lies in the other; 0: orthogonal;
                    max(r1, r2) / n is what chance gives in n dimensions. Adapters that were started from one seed
                    read in nearly the same space whatever they learned.
    cosine          <D1, D2> / (||D1|| ||D2||)

Dense changes stand in memory some rows at a time, and of the spaces only the factors.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch

from qlora.errors import AdapterError
from qlora.library.combine import Combination, Share
from qlora.library.diff import Factors, NotPlain, Weights, change_norms, layer_of, natural

__all__ = ["COMBINED", "MOST_LOSS", "MOST_POINTS", "Overlap", "Report", "Score", "grouped", "interference", "overlap"]

MOST_POINTS = 0.05  # of exact match that a task may lose against its own adapter without a warning
MOST_LOSS = 0.10  # by which its held-out loss may grow, in parts of it
BASE, COMBINED = "base", "combined"  # who answers, beside the adapters
_WIDTH = 100  # columns of a terminal
_PIECE = 1 << 22  # entries of a dense change that stand at a time: 16 MiB in fp32
_RANK = 1e-6  # of the largest singular value: what is below is no direction


@dataclass(frozen=True, slots=True)
class Overlap:
    """How two adapters meet in one weight, or in a group of them.

    shared, conflict  sums of min(|D1|, |D2|): over all entries, and where their signs differ
    writes, reads     overlaps of what they write and read; of a group the means
    chance            what chance would give for writes and reads
    cosine            of a group the mean; None where one of them changes nothing
    """

    name: str
    shared: float
    conflict: float
    writes: float | None
    reads: float | None
    chance: tuple[float, float]
    cosine: float | None

    @property
    def sign_conflict(self) -> float | None:
        return self.conflict / self.shared if self.shared else None


def overlap(name: str, first: Factors, second: Factors, weights: tuple[float, float] = (1.0, 1.0)) -> Overlap:
    """As at the top of this file. weights: of the adapters in a combination."""
    pairs = [(A.double(), B.double() * s * w) for (A, B, s), w in zip((first, second), weights, strict=True)]
    (A1, B1), (A2, B2) = [(A.float(), B.float()) for A, B in pairs]
    shared = conflict = 0.0
    rows = max(_PIECE // A1.shape[1], 1)
    for one, two in zip(B1.split(rows), B2.split(rows), strict=True):
        D1, D2 = one @ A1, two @ A2
        least = torch.minimum(D1.abs(), D2.abs())
        shared += least.sum().item()
        conflict += least[D1 * D2 < 0].sum().item()
    (U1, V1), (U2, V2) = (_spaces(A, B) for A, B in pairs)
    r = max(U1.shape[1], U2.shape[1])
    n1, n2, difference = change_norms(*((A, B, 1.0) for A, B in pairs))
    cosine = (n1**2 + n2**2 - difference**2) / (2 * n1 * n2) if n1 and n2 else None
    chance = r / U1.shape[0], r / V1.shape[0]
    return Overlap(name, shared, conflict, _common(U1, U2), _common(V1, V2), chance, cosine)


def interference(one: Share, two: Share) -> list[Overlap]:
    """How two adapters meet in each weight that both are on. Raises AdapterError where there is none."""
    sources, found = (Weights(one.path), Weights(two.path)), []
    for module in sources[0].modules:
        try:
            first, second = (source.factors(module) for source in sources)
        except NotPlain:
            continue
        if first and second:
            found.append(overlap(module, first, second, (one.weight, two.weight)))
    if not found:
        raise AdapterError(f"{one.name} and {two.name} are on no weight together: they cannot interfere")
    return found


def grouped(overlaps: Iterable[Overlap], key: Callable[[Overlap], Any]) -> dict[Any, Overlap]:
    """Of weights that have the same key, together."""
    groups: dict[Any, list[Overlap]] = {}
    for each in overlaps:
        groups.setdefault(key(each), []).append(each)

    def together(name: Any, each: list[Overlap]) -> Overlap:
        sums, means = ("shared", "conflict"), ("writes", "reads", "cosine")
        figures: dict[str, Any] = {key: sum(getattr(one, key) for one in each) for key in sums}
        figures |= {key: _mean([getattr(one, key) for one in each]) for key in means}
        chance = tuple(sum(one.chance[n] for one in each) / len(each) for n in (0, 1))
        return Overlap(name=str(name), chance=chance, **figures)  # type: ignore[arg-type]

    return {name: together(name, groups[name]) for name in sorted(groups, key=lambda name: natural(str(name)))}


def layer_and_kind(each: Overlap) -> tuple[str, str]:
    return layer_of(each.name), each.name.rsplit(".", 1)[-1]


@dataclass(frozen=True, slots=True)
class Score:
    """How someone does on a task's held-out rows. exact_match: the share of them answered to the letter, 0..1."""

    loss: float
    exact_match: float | None

    def __str__(self) -> str:
        said = "" if self.exact_match is None else f"exact match {self.exact_match:.1%}, "
        return f"{said}loss {self.loss:.4g}"


@dataclass(frozen=True, slots=True)
class Report:
    """The interference of some adapters, alone or combined.

    combination  how they were combined; None where they were not
    away         how far it is from the weighted sum of their changes, in parts of that
    overlaps     of each two of them, by weight
    scores       task -> who answers -> how well; a task is known by the adapter that learned it
    """

    shares: tuple[Share, ...]
    sha256: Mapping[str, str]
    combination: Combination | None = None
    away: float | None = None
    overlaps: Mapping[tuple[str, str], list[Overlap]] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, shares: Sequence[Share], sha256: Mapping[str, str], **what: Any) -> Report:
        """With the figures that the weights alone give."""
        pairs = {(a.name, b.name): interference(a, b) for a, b in combinations(shares, 2)}
        return cls(tuple(shares), sha256, overlaps=pairs, **what)

    def who(self) -> list[str]:
        """Those who answered, in the order of a table's columns."""
        there = {name for each in self.scores.values() for name in each}
        return [name for name in (BASE, *(share.name for share in self.shares), COMBINED) if name in there]

    def warnings(self) -> list[str]:
        """The tasks that lose more than MOST_POINTS or MOST_LOSS in the combination, against their own adapters."""
        found = []
        for task, scores in self.scores.items():
            if task not in scores or COMBINED not in scores:
                continue
            own, now = scores[task], scores[COMBINED]
            lost = (own.exact_match or 0) - (now.exact_match or 0)
            if lost > MOST_POINTS + 1e-9:
                points = f"{own.exact_match or 0:.1%} to {now.exact_match or 0:.1%}"
                found.append(f"{task} loses {100 * lost:.1f} points of exact match, {points}")
            if now.loss > own.loss * (1 + MOST_LOSS):
                found.append(f"{task}: held-out loss {own.loss:.4f} to {now.loss:.4f}, {now.loss / own.loss:.3g}x")
        return found

    def how(self) -> str:
        """`orders x 0.6 + appointments x 0.4, by ties (density 0.5)`."""
        names = " + ".join(f"{share.name} x {share.weight:g}" for share in self.shares)
        if (how := self.combination) is None:
            return names
        more = {"density": how.density, "rank": how.rank, "seed": how.seed}
        return f"{names}, by {how.method} ({', '.join(f'{k} {v:g}' for k, v in more.items() if v is not None)})"

    def lines(self) -> list[str]:
        """For a terminal: at most 100 columns, of up to three adapters."""
        found = [self.how()] + [f"note: {note}" for note in self.notes]
        if self.away is not None:
            found.append(f"{self.away:.1%} away from the weighted sum of the changes")
        for (a, b), overlaps in self.overlaps.items():
            every = grouped(overlaps, lambda _: "all")["all"]
            found += ["", f"{f'{a} and {b}'[:36]:<38}{'sign conflict':>15}{'writes':>12}{'reads':>12}{'cosine':>12}"]
            for each in (*grouped(overlaps, lambda each: layer_and_kind(each)[1]).values(), every):
                figures = "".join(f"{_share(x):>12}" for x in (each.writes, each.reads, each.cosine))
                found.append(f"  {each.name[:34]:<36}{_share(each.sign_conflict):>15}{figures}")
            found.append(
                f"  {'by chance':<36}{_share(0.5):>15}{every.chance[0]:>12.1%}{every.chance[1]:>12.1%}{'':>12}"
            )
        if who := self.who():
            width = max(15, min(19, (_WIDTH - 24) // len(who)))
            found += ["", "held-out rows of".ljust(24) + "".join(f"{name[: width - 2]:>{width}}" for name in who)]
            for task, scores in self.scores.items():
                cells = (f"{_cell(scores.get(name)):>{width}}" for name in who)
                found.append(f"  {task[:20]:<22}" + "".join(cells))
            found.append("  (exact match, where answers are counted, and loss)")
        found += [f"warning: {line}" for line in self.warnings()]
        return [part for line in found for part in (textwrap.wrap(line, _WIDTH) if len(line) > _WIDTH else [line])]

    def markdown(self, picture: str) -> str:
        """For a page. picture: the file name of the drawing."""
        who = self.who()
        rows = ["| held-out rows of | " + " | ".join(who) + " |", "|---|" + "---:|" * len(who)]
        rows += [
            f"| {task} | " + " | ".join(_cell(scores.get(name)) for name in who) + " |"
            for task, scores in self.scores.items()
        ]
        said = [f"- {line}" for line in (*self.notes, *self.warnings())]
        return "\n".join(
            ["# Interference", "", self.how(), "", f"![interference]({picture})", "", *rows * bool(who), "", *said, ""]
        )

    def to_json(self) -> str:
        """All of it, for programs; adapters by name and SHA-256 of their weights, as paths are one machine's."""

        def described(each: Overlap) -> dict[str, Any]:
            return asdict(each) | {"sign_conflict": each.sign_conflict}

        pairs = [
            {"of": pair, "all": described(grouped(each, lambda _: "all")["all"]), "weights": list(map(described, each))}
            for pair, each in self.overlaps.items()
        ]
        how = self.combination
        by = {key: getattr(how, key) for key in ("method", "density", "rank", "seed")} if how else None
        value = {
            "adapters": [{"name": s.name, "sha256": self.sha256.get(s.name), "weight": s.weight} for s in self.shares],
            "combined_by": by,
            "away": self.away,
            "scores": {task: {who: asdict(score) for who, score in each.items()} for task, each in self.scores.items()},
            "warnings": self.warnings(),
            "notes": list(self.notes),
            "overlaps": pairs,
        }
        return json.dumps(value, indent=1, allow_nan=False) + "\n"


# --- parts


def _spaces(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases of the columns [out, k] and the rows [in, k] of B A, k its rank."""
    (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    k = int(S.gt(_RANK * S[0]).sum()) if len(S) and S[0] > 0 else 0
    return Qb @ U[:, :k], Qa @ Vh.T[:, :k]


def _common(one: torch.Tensor, two: torch.Tensor) -> float | None:
    least = min(one.shape[1], two.shape[1])
    return (one.T @ two).square().sum().item() / least if least else None


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.loss:.4g}" if score.exact_match is None else f"{score.exact_match:.1%}, {score.loss:.3g}"
