"""The figures of a deep model's step from steps of a few layers, to the byte.

A decoder's layers repeat. So at each corner of a step (its first layer, its last, around the first kept one, the loss,
the optimizer) what is held grows by the same with each layer more and with each micro-batch more: it is affine in the
number of computed layers, of kept layers, of micro-batches, and in their products with the last. It is simulated at two
of each, and the rest is arithmetic. In between corners it is affine as well, so the peak is at one of them.

How it grows depends on where things are, and not on the pieces in which the loss and a layer are computed. So a step in
pieces is simulated at one point, and the step that is not in pieces lends it its growth.

The four-bit base alone is not periodic, as `spread` mixes its places and host layers share arenas: its bytes at rest
are those that the real `Store` gives for the whole model, and what is fetched follows from the order of visits.

A model whose layers do not repeat is simulated whole.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from qlora.config import Config, MemoryConfig
from qlora.model.batch import Batch, regroup
from qlora.model.blocks import Blocks
from qlora.model.homes import layout_of, padded
from qlora.model.load import four_bit_of, four_bit_targets
from qlora.model.store import Groups, groups_of, tiers_of
from qlora.plan.ledger import ACCELERATOR, HOST, Label
from qlora.plan.simulate import BASE, Record, at_rest, cut_of, moment, record, skeleton
from qlora.plan.types import PHASES, Phase, Usage

Corner = tuple[str, str, int]  # phase, what its layer is counted from, how far
Point = tuple[int, int, int]  # periods of computed layers, of kept layers, micro-batches
Held = Mapping[Any, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Pattern:
    """How layers repeat: after `before` layers a period, again and again, and `rest` layers of one more."""

    before: int
    period: int
    rest: int
    layers: int

    @classmethod
    def of(cls, kinds: Sequence[Any]) -> Pattern | None:
        """The shortest there is with at least four periods; None: none."""
        n = len(kinds)
        for period in range(1, n // 4 + 1):
            repeats = [kinds[i] == kinds[i + period] for i in range(n - period)]
            # The first layer is not like the others: nobody asks for the gradient of what it receives.
            before = max((i + 1 for i, same in enumerate(repeats) if not same), default=1)
            if n - before >= 4 * period:
                return cls(before, period, (n - before) % period, n)
        return None

    @property
    def periods(self) -> int:
        """Of the model."""
        return (self.layers - self.before - self.rest) // self.period

    def depth(self, periods: int) -> int:
        """Layers of a model with so many periods."""
        return self.before + self.rest + self.period * periods


@dataclass(frozen=True, slots=True)
class Place:
    """Where the figures are asked for, and where to simulate to know them.

    kept   layers that are not computed again
    unit   [B, T] of the step's micro-batches, k of them
    rest   of those that are of another size
    start  of what is simulated, the point with the fewest of all
    """

    pattern: Pattern
    kept: int
    unit: tuple[int, int]
    k: int
    rest: tuple[tuple[int, int], ...]
    start: Point

    @classmethod
    def of(cls, pattern: Pattern, kept: int, cut: Sequence[tuple[int, int]]) -> Place:
        k = sum(each == cut[0] for each in cut)
        deep, keeps = pattern.periods - kept // pattern.period, kept // pattern.period
        # Between the first layer and the last there must be one that is computed again.
        fewest = (1 if pattern.period > 1 else 2, min(keeps, 1), 2)
        nearest = zip((deep, keeps, k), fewest, strict=True)
        start = tuple(wanted if wanted <= few + 1 else few for wanted, few in nearest)
        return cls(pattern, kept, cut[0], k, tuple(cut[k:]), start)  # type: ignore[arg-type]

    @property
    def wanted(self) -> Point:
        keeps = self.kept // self.pattern.period
        return self.pattern.periods - keeps, keeps, self.k

    @property
    def points(self) -> list[tuple[Point, int]]:
        """Where to simulate, and how much of each is in what is asked for."""
        (d, m, k), (deep, keeps, wide) = self.start, (b - a for a, b in zip(self.start, self.wanted, strict=True))
        weights = {
            (d, m, k): 1 - deep - keeps - wide + (deep + keeps) * wide,
            (d + 1, m, k): deep - deep * wide,
            (d, m + 1, k): keeps - keeps * wide,
            (d, m, k + 1): wide - (deep + keeps) * wide,
            (d + 1, m, k + 1): deep * wide,
            (d, m + 1, k + 1): keeps * wide,
        }
        return [(point, weight) for point, weight in weights.items() if weight]

    def layers(self, point: Point) -> int:
        """Of the model that is simulated there."""
        return self.pattern.depth(point[0] + point[1])

    @property
    def can_lend(self) -> bool:
        """Whether each layer of the start stands for a number of the model's layers."""
        return not self.rest and (self.pattern.period == 1 or (self.pattern.rest > 0 and not self.kept))

    def stands_for(self, at: Label) -> int:
        """How many of the model's layers a layer of the start stands for."""
        phase, i = at
        if phase not in ("forward", "backward") or i < self.pattern.before:
            return 1
        deep, keeps, _ = self.start
        if i >= self.layers(self.start) - 1 - keeps * self.pattern.period:
            return self.wanted[1] // keeps
        if self.pattern.period == 1:  # of the computed layers the last one is the turn
            return (self.wanted[0] - 1) // (deep - 1)
        return self.wanted[0] // deep if i < self.pattern.before + self.pattern.period * deep else 1


class Simulator:
    """One optimizer step of a model, simulated for any `memory` section.

    config        the recipe
    model_config  the model's configuration; its weights are not needed
    tokens        of a sequence
    device        HOST simulates training on the CPU
    """

    def __init__(
        self, config: Config, model_config: PreTrainedConfig, tokens: int, device: torch.device = ACCELERATOR
    ) -> None:
        self.config, self.model_config, self.tokens, self.device = config, model_config, tokens, device
        self._records: dict[Any, Record] = {}

    @cached_property
    def whole(self) -> PreTrainedModel:
        """The model's structure, all on the meta device."""
        return skeleton(self.config, self.model_config)

    @cached_property
    def layers(self) -> int:
        """How many the model has."""
        return len(_layers_of(self.whole))

    @property
    def itemsize(self) -> int:
        """Bytes of a number that is not in four bits."""
        return self.whole.dtype.itemsize

    @property
    def width(self) -> int:
        """Bytes of a token's hidden state."""
        embedding: Any = self.whole.get_input_embeddings()
        return embedding.weight.shape[1] * self.itemsize

    @property
    def head_shape(self) -> tuple[int, int]:
        """[vocab_size, hidden_size]"""
        head: Any = self.whole.get_output_embeddings()
        return tuple(head.weight.shape)

    @property
    def vocabulary_bytes(self) -> int:
        """Of embedding and head, which are one where they are tied."""
        ends = [self.whole.get_input_embeddings(), self.whole.get_output_embeddings()]
        return sum(weight.nbytes for weight in {id(end.weight): end.weight for end in ends}.values())

    @cached_property
    def groups(self) -> dict[str, dict[str, torch.Size]]:
        """The four-bit weights of each layer."""
        return groups_of(self.whole, four_bit_targets(self.whole))

    @cached_property
    def pattern(self) -> Pattern | None:
        """How its layers repeat; None: they do not, or not in shallower models of the kind."""
        lora = self.config.lora
        if self.config.method != "full" and (lora.layers_to_transform is not None or lora.rank_pattern):
            return None  # PEFT tells layers apart
        kinds = _kinds(self.whole)
        pattern = Pattern.of(kinds)
        if pattern is not None:
            few = pattern.depth(1)
            if _kinds(skeleton(self.config, self.shallow(few))) != kinds[:few]:
                return None
        return pattern

    def micro_batches(self, memory: MemoryConfig) -> list[tuple[int, int]]:
        """[B, T] of each of the step's micro-batches, as the step will cut them."""
        training, tokens = self.config.training, self.tokens
        rows, documents = training.per_device_train_batch_size, ((tokens,),)
        if self.config.data.packing:
            rows, tokens, documents = 1, rows * tokens, ((tokens,) * rows,)
        ids = torch.empty(rows, tokens, dtype=torch.int64, device="meta")
        given = [Batch(ids, ids, ids, documents=documents * rows)] * training.gradient_accumulation_steps
        return [(b.input_ids.shape[0], b.input_ids.shape[1]) for b in regroup(given, memory.micro_batch_tokens)]

    def usage(self, memory: MemoryConfig) -> Usage:
        """What a step takes. Raises ModelError, AdapterError where the recipe does not fit the model."""
        pattern, cut = self.pattern, self.micro_batches(memory)
        kept = min(memory.layers_kept, self.layers - 1)  # as the step has it
        if pattern is None or kept % pattern.period or kept > pattern.period * pattern.periods:
            return self._at(self.layers, memory, cut).usage()
        place = Place.of(pattern, kept, cut)
        plain = self._plain(memory, place) if place.can_lend else memory
        points = [(weight, self._stand(place, point, plain)) for point, weight in place.points]
        found = _blended(points, place)
        if plain != memory:
            own, start = (self._stand(place, place.start, each) for each in (memory, plain))
            found = _lent(found, own, start, place)
        return self._with_base(found.usage(), memory)

    def few(self, layers: int, memory: MemoryConfig, micro_batches: Sequence[tuple[int, int]]) -> Record:
        """A step of the model with its first layers alone."""
        return self._at(min(layers, self.layers), memory, micro_batches)

    def _plain(self, memory: MemoryConfig, place: Place) -> MemoryConfig:
        """The same in as few pieces as can be."""
        whole = {"layer_tile_tokens": None, "embeddings": "device", "loss_chunk_tokens": place.unit[0] * place.unit[1]}
        return memory.model_copy(update=whole)

    def _stand(self, place: Place, point: Point, memory: MemoryConfig) -> Record:
        """A step of a few layers at a point: all of them on the device, or none."""
        on_device, on_host = memory.layers_on_device, memory.layers_on_host
        streamed = on_device is not None and on_device < self.layers
        on_file = streamed and on_host is not None and (on_device or 0) + on_host < self.layers
        here = {
            "layers_on_device": 0 if streamed else None,
            "layers_on_host": 0 if on_file else None,
            "layers_kept": point[1] * place.pattern.period,
        }
        micro_batches = [place.unit] * point[2] + list(place.rest)
        return self._at(place.layers(point), memory.model_copy(update=here), micro_batches)

    def _at(self, layers: int, memory: MemoryConfig, micro_batches: Sequence[tuple[int, int]]) -> Record:
        memory = memory.model_copy(update={"micro_batch_tokens": 0})  # they are cut already
        key = (layers, memory, tuple(micro_batches))
        if key not in self._records:
            config = self.config.model_copy(update={"memory": memory})
            shallow, document = self.shallow(layers), self.tokens
            like = self._like if layers < self.layers else None
            self._records[key] = record(config, shallow, micro_batches, document, self.device, like)
        return self._records[key]

    @cached_property
    def _like(self) -> Blocks | None:
        """The cut of a model with one layer of each kind."""
        deep = 3 if self.pattern is None else max(self.pattern.depth(self.pattern.period > 1), 2)
        return cut_of(self.config, self.shallow(deep))

    @property
    def can_be_cut(self) -> bool:
        """Whether the step is layer-major."""
        return self.config.memory.order != "standard" and self._like is not None

    @property
    def can_be_tiled(self) -> bool:
        """Whether its layers run in tiles of tokens."""
        return self._like is not None and self._like.can_tile

    def shallow(self, layers: int) -> PreTrainedConfig:
        """The configuration of a model with the first layers alone."""
        if layers >= self.layers:
            return self.model_config
        few = copy.deepcopy(self.model_config)
        text = few.get_text_config(decoder=True)
        for key, value in text.to_dict().items():
            if isinstance(value, list) and len(value) == self.layers:
                setattr(text, key, value[:layers])
        text.num_hidden_layers = layers
        return few

    def _with_base(self, usage: Usage, memory: MemoryConfig) -> Usage:
        """The same with the four-bit base of the whole model in its places."""
        if self.config.method != "qlora":
            return usage
        tiers = tiers_of(self.groups, memory)
        streamed = any(tier != "device" for tier in tiers.values())
        places = at_rest(self.config, self.groups, tiers, self.device)
        if streamed:
            away = "file" if "file" in tiers.values() else "host"
            all_away = {group: away if group else tier for group, tier in tiers.items()}
            ways = ["from file"] if self.device == HOST else ["from file", "host to device"]  # no bus to itself
            for sign, places_of in ((1, tiers), (-1, all_away)):
                for phase, moved in fetched(self.groups, places_of, self.config).items():
                    for way in ways:
                        usage.phases[phase].moved[way] += sign * moved[way]
        return replace(
            usage,
            device=_with(usage.device, BASE, places.device),
            host=_with(usage.host, BASE, places.host),
            file=_with(usage.file, BASE, places.file),
            slack=usage.slack + (places.slack if streamed else 0),
        )


@dataclass(frozen=True, slots=True)
class _Found:
    """Figures of the whole model, by corner. What of the base they hold means nothing yet."""

    device: dict[Corner, dict[str, int]]
    host: dict[Corner, dict[str, int]]
    file: dict[str, int]
    slack: int
    phases: dict[str, Phase]
    tokens: int
    order: str
    place: Place

    def usage(self) -> Usage:
        """As a whole."""
        corner = max(self.device, key=lambda corner: sum(self.device[corner].values()))
        layers = self.place.pattern.layers
        return Usage(
            device=self.device[corner],
            host=max(self.host.values(), key=lambda held: sum(held.values()), default={}),
            file=self.file,
            moment=moment(_label(corner, layers, self.place.kept)),
            slack=self.slack,
            phases=self.phases,
            tokens=self.tokens,
            layers=layers,
            order=self.order,
        )


def _blended(points: Sequence[tuple[int, Record]], place: Place) -> _Found:
    """The figures at the place that the weights are of."""
    phases = {name: Phase() for name in PHASES}
    for weight, at in points:
        for (name, _), phase in at.phases.items():
            _add(phases[name], phase, weight)
    device, host = (_corners([(weight, at, getattr(at, where)) for weight, at in points], place) for where in _WHERE)
    return _Found(
        device=device,
        host=host,
        file=_sum([(weight, at.file) for weight, at in points]),
        slack=max(at.slack for _, at in points),
        phases=phases,
        tokens=sum(weight * at.tokens for weight, at in points),
        order=points[0][1].order,
        place=place,
    )


_WHERE = ("device", "host")


def _lent(grown: _Found, own: Record, start: Record, place: Place) -> _Found:
    """What `own` grows to, where `start` grows to `grown`."""
    for label in own.phases.keys() | start.phases.keys():
        # They differ in what each micro-batch takes, and in nothing that a layer takes by itself.
        differing = Phase()
        _add(differing, own.phases.get(label, Phase()), 1)
        _add(differing, start.phases.get(label, Phase()), -1)
        _add(grown.phases[label[0]], differing, place.k * place.stands_for(label), place.start[2])
    mine, theirs = (_blended([(1, at)], place) for at in (own, start))
    device, host = (
        {
            corner: _sum([(1, held), (1, _at(grown, where, corner)), (-1, _at(theirs, where, corner))])
            for corner, held in getattr(mine, where).items()
        }
        for where in _WHERE
    )
    return replace(
        grown,
        device=device,
        host=host,
        file=_sum([(1, grown.file), (1, own.file), (-1, start.file)]),
        slack=own.slack,
    )


def _at(found: _Found, where: str, corner: Corner) -> Mapping[str, int]:
    return getattr(found, where).get(corner, {})  # on the host there may be nothing


def _add(into: Phase, phase: Phase, weight: int, over: int = 1) -> None:
    """Add a phase `weight / over` times; `over` divides all that is in it."""
    for kind in ("work", "host_work", "moved"):
        counter = getattr(into, kind)
        for key, n in getattr(phase, kind).items():
            counter[key] += weight * n // over


def _corners(points: Sequence[tuple[int, Record, Held]], place: Place) -> dict[Corner, dict[str, int]]:
    """What is held at each corner: layers are counted from the first, from the last and from the first kept one, as far
    as their pattern reaches."""
    pattern = place.pattern
    near, far = pattern.before + pattern.period, pattern.rest + pattern.period
    by_point: list[tuple[int, dict[Corner, Mapping[str, int]]]] = []
    for weight, at, held in points:
        # At a point with fewer kept layers than are wanted there are fewer, but none only where none is wanted.
        kept = at.kept
        first_kept = at.layers - 1 - kept
        found: dict[Corner, Mapping[str, int]] = {}
        for (phase, i), by_category in held.items():
            if phase not in ("forward", "backward"):
                found[phase, "", 0] = by_category
                continue
            if i < min(near, first_kept):
                found[phase, "first", i] = by_category
            if at.layers - 1 - i <= far:
                found[phase, "last", at.layers - 1 - i] = by_category
            if kept and -pattern.period <= i - first_kept < pattern.period:
                found[phase, "kept", i - first_kept] = by_category
        by_point.append((weight, found))
    shared = set.intersection(*(set(found) for _, found in by_point))
    return {corner: _sum([(weight, found[corner]) for weight, found in by_point]) for corner in shared}


def _label(corner: Corner, layers: int, kept: int) -> Label:
    phase, anchor, distance = corner
    first = {"": 0, "first": 0, "last": layers - 1, "kept": layers - 1 - kept}[anchor]
    return phase, first - distance if anchor == "last" else first + distance


def _sum(terms: Sequence[tuple[int, Mapping[str, int]]]) -> dict[str, int]:
    total = Counter[str]()
    for weight, by_category in terms:
        for category, n in by_category.items():
            total[category] += weight * n
    return {category: n for category, n in total.items() if n}


def _with(by_category: Mapping[str, int], category: str, nbytes: int) -> dict[str, int]:
    return {name: n for name, n in {**by_category, category: nbytes}.items() if n}


def fetched(groups: Groups, tiers: Mapping[str, str], config: Config) -> dict[str, Counter[str]]:
    """Bytes of layers that a step brings to the device, by the phase that they come in.

    Each that is not there comes for each visit, but for the two that find it in the slot: at the turn, and the first,
    which the step before ended with. It is sent for when the one before it has left the slot.
    """
    names = [name for name in groups if name]
    last = len(names) - 1
    visits = [(i, "turn" if i == last else "forward") for i in range(last + 1)]
    visits += [(i, "backward") for i in reversed(range(last))]
    away = [(i, phase) for i, phase in visits if tiers[names[i]] != "device"]
    moved: dict[str, Counter[str]] = {}
    for (before, phase), (i, _) in pairwise(away):
        if i != before:
            nbytes = layout_of(groups[names[i]], four_bit_of(config.quantization)).nbytes
            into = moved.setdefault(phase, Counter())
            if tiers[names[i]] == "file":
                nbytes = padded(nbytes)
                into["from file"] += nbytes
            into["host to device"] += nbytes
    return moved


def _layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The longest list of modules, of these the one with most parameters: a decoder's layers."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda m: (len(m), sum(p.numel() for p in m.parameters())), default=nn.ModuleList())


def _kinds(model: PreTrainedModel) -> list[Any]:
    """What each layer is made of, to compare."""
    return [[(name, _facts(module)) for name, module in layer.named_modules()] for layer in _layers_of(model)]


def _facts(module: nn.Module) -> Any:
    plain = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and key != "layer_idx" and not key.startswith("_")
    }
    return type(module), plain, [(name, p.shape) for name, p in module.named_parameters(recurse=False)]
