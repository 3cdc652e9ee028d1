"""What a step takes under any `memory` section, roughly and at once: to search by.

One step of three layers is simulated, and one more in tiles where tiles are asked for. What a layer and the loss work
with is read off these; what is held meanwhile and moved is counted up for the whole model. Each knob is then a line of
arithmetic. That is within some percent of the simulation, in microseconds. What is chosen by it is simulated before it
is believed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from qlora.config import MemoryConfig
from qlora.model.homes import layout_of, padded
from qlora.model.load import four_bit_of
from qlora.plan.ledger import HOST, WORKING_SET, Label
from qlora.plan.periodic import Simulator
from qlora.plan.seconds import busy
from qlora.plan.simulate import (
    ADAPTERS,
    DENSE,
    ENDS,
    GRADIENTS,
    LOSS,
    OPTIMIZER,
    Record,
)
from qlora.plan.solve import Choice, Estimate
from qlora.plan.types import Machine, Phase

LAYERS = 3  # that are simulated: the first, one that is like the others, and the last


class Sketch:
    """Estimates of the step of a simulator's recipe on a machine.

    memory  the recipe's section, from which choices differ
    """

    def __init__(self, simulator: Simulator, memory: MemoryConfig, machine: Machine) -> None:
        self.of, self.memory, self.machine = simulator, memory, machine
        self.on_cpu = simulator.device == HOST
        self._cuts: dict[int, tuple[int, int]] = {}
        self._longer = 1.0  # tokens of a sequence, in the recipe's
        self._times: dict[tuple[Label, bool], float] = {}

    @cached_property
    def few(self) -> Record:
        """The step of three layers, with two micro-batches, that all is read off."""
        return self._simulated(None)

    @cached_property
    def tiled(self) -> Record:
        """The same, each micro-batch in two tiles."""
        return self._simulated(max(self._unit // 2, 1))

    @cached_property
    def _cut(self) -> tuple[int, int]:
        """[B, T] of the micro-batches that are simulated: all of the step grows with them in proportion."""
        return self.of.micro_batches(self.memory.model_copy(update={"micro_batch_tokens": 1024}))[0]

    @property
    def _unit(self) -> int:
        return self._cut[0] * self._cut[1]

    def _simulated(self, tile: int | None) -> Record:
        away = {} if self.on_cpu else {"layers_on_device": 0, "layers_on_host": None, "activations": "host"}
        same = {"adapters": "device", "embeddings": "device", "layers_kept": 0, "loss_chunk_tokens": self._unit}
        memory = self.memory.model_copy(update=away | same | {"layer_tile_tokens": tile})
        return self.of.few(LAYERS, memory, [self._cut] * 2)

    @cached_property
    def _facts(self) -> _Facts:
        few, rates, layers = self.few, self.machine.rates, self.of.layers
        rest, turn = few.device["before the step", 0], few.device["turn", 2]
        four_bit = four_bit_of(self.of.config.quantization) if self.of.config.method == "qlora" else None
        dense = sum(shape.numel() for shape in self.a_layer.values()) * 2 if four_bit else 0
        layer = padded(layout_of(self.a_layer, four_bit).nbytes) if four_bit else 0
        boundary = self._unit * self.of.width
        return _Facts(
            boundary=boundary,
            entry=few.entry,
            dense=dense if self.on_cpu else 0,
            loss=(turn.get(LOSS, 0) - boundary) / self._unit,
            ends=rest.get(ENDS, 0),
            vocabulary=self.of.vocabulary_bytes,
            buffers=rest.get(DENSE, 0),
            slot=0 if self.on_cpu else layer,
            adapter=rest.get(ADAPTERS, 0) / LAYERS,
            optimizer=rest.get(OPTIMIZER, 0) / LAYERS,
            gradient=few.device["optimizer", 0].get(GRADIENTS, 0) / LAYERS,
            elsewhere=layout_of(self.of.groups.get("", {}), four_bit).nbytes if four_bit else 0,
            layer=layer,
            expansion=dense * 1.26 / rates.memory,
            layers=layers,
        )

    @cached_property
    def _head(self) -> tuple[int, int]:
        """Bytes of the head, and of the chunk of it that is on the device at a time."""
        rows, width = self.of.head_shape
        row = width * self.of.itemsize
        return rows * row, min(self.memory.vocabulary_chunk, rows) * row

    @property
    def a_layer(self) -> dict[str, torch.Size]:
        return next((inside for group, inside in self.of.groups.items() if group), {})

    def _working(self, at: Label, share: float) -> float:
        """Bytes that a layer works with. share: of its tokens that pass at one time."""
        whole = self.few.device[at].get(WORKING_SET, 0) - 2 * self.few.entry
        if share >= 1:
            return whole
        half = self.tiled.device[at].get(WORKING_SET, 0) - 2 * self.tiled.entry
        return max(whole - 2 * (whole - half) * (1 - share), 0)

    def _seconds(self, at: Label, tiled: bool) -> float:
        """Of one micro-batch on the device in one phase of one layer, its expansion aside."""
        key = at, tiled
        if key not in self._times:
            record = self.tiled if tiled else self.few
            total, _ = busy(record.phases.get(at, Phase()).work, self.machine.rates)
            apart = self._facts.expansion if at[0] in ("forward", "turn", "backward") else 0
            self._times[key] = max(total - apart, 0) / 2
        return self._times[key]

    def estimate(self, choice: Choice) -> Estimate:
        """What a choice takes; its keys are those of the recipe's `memory` section."""
        f, rates = self._facts, self.machine.rates
        tokens, k = self.cut(choice["micro_batch_tokens"])
        size = tokens / k / self._unit  # of a micro-batch, in those that were simulated
        tile = choice["layer_tile_tokens"]
        share = 1.0 if tile is None else min(tile / (tokens / k), 1.0)
        kept = min(choice["layers_kept"], f.layers - 1) if share >= 1 else 0
        first = f.layers - 1 - kept  # from here on up nothing is computed again
        here = min(choice["layers_on_device"], f.layers)
        on_host = min(choice["layers_on_host"], f.layers - here)
        on_file = f.layers - here - on_host
        activations, away = choice["activations"], choice["adapters"] == "host" and not self.on_cpu
        ends_away = choice["embeddings"] == "host" and not self.on_cpu
        one = f.boundary * size
        rows = (first + 1) * k * one

        device = f.elsewhere + here * f.layer + f.buffers - (f.slot if here == f.layers else 0) + f.ends
        host, file = 0 if self.on_cpu else on_host * f.layer, on_file * f.layer
        trained = f.layers * (f.adapter + f.optimizer)
        if away:
            host += trained + f.layers * f.gradient
            device += f.adapter + f.gradient
        else:
            device += trained
        if ends_away:
            device -= f.vocabulary - 2 * self._head[1]
            host += f.vocabulary
        if activations == "device":
            device += rows
        else:
            device += (5 if k > 1 else 3) * one
            if activations == "host":
                host += rows + k * one
            else:
                file += rows + k * one
                host += 8 * one
        graph = self._working(("turn", 2), 1.0) - f.dense
        loss = f.loss * choice["loss_chunk_tokens"] + (3 if ends_away else 1) * one
        gradients = 0 if away else f.gradient
        device += f.entry * k * size + max(
            self._scaled(("turn", 2), share, size) + kept * k * graph * size + loss + gradients,
            self._scaled(("backward", 1), share, size) + (0 if away else (f.layers - 1) * f.gradient),
            self._scaled(("forward", 1), share, size),
            0 if away else f.layers * f.gradient,
        )
        if not self.on_cpu:
            device = device * 1.01 + self.few.slack + self.machine.context

        tiled, many = share < 1, k * size
        each = {at[0]: many * self._seconds(at, tiled) for at in (("forward", 1), ("turn", 2), ("backward", 1))}
        streamed = (f.layers - here) * f.slot
        crossing = first * k * one if activations != "device" and not self.on_cpu else 0
        to_disk = first * k * one if activations == "file" else 0
        moving = f.layers * f.adapter if away else 0
        forward = max(
            (f.layers - 1) * (f.expansion + each["forward"]),
            (streamed + crossing + moving) / rates.bus,
            (on_file * f.layer + 2 * to_disk) / rates.disk,
        )
        backward = max(
            first * (f.expansion + each["backward"])
            + kept * (f.expansion + max(each["backward"] - each["forward"], 0)),
            (streamed + 2 * crossing + moving) / rates.bus,
            (on_file * f.layer + 3 * to_disk) / rates.disk,
        )
        turn = max(f.expansion + each["turn"], 2 * k * self._head[0] / rates.bus if ends_away else 0)
        updates, _ = busy(self.few.phases.get(("optimizer", 0), Phase()).work, rates)
        if away:
            nbytes = sum(b * n for (_, b), n in self.few.phases[("optimizer", 0)].work.items())
            updates = nbytes / rates.host_memory
        seconds = forward + turn + backward + updates * f.layers / LAYERS + many * self._seconds(("prologue", 0), False)
        return Estimate(int(device), int(host), int(file), seconds * (self.machine.seconds_ratio or 1.0))

    def _scaled(self, at: Label, share: float, size: float) -> float:
        dense = self._facts.dense
        return (self._working(at, share) - dense) * size + dense

    def cut(self, micro_batch_tokens: int) -> tuple[int, int]:
        """Tokens of a step, and its number of micro-batches."""
        if micro_batch_tokens not in self._cuts:
            cut = self.of.micro_batches(self.memory.model_copy(update={"micro_batch_tokens": micro_batch_tokens}))
            self._cuts[micro_batch_tokens] = sum(b * t for b, t in cut), len(cut)
        tokens, k = self._cuts[micro_batch_tokens]
        return int(tokens * self._longer), k

    @property
    def longest(self) -> int:
        """Tokens of the largest micro-batch that there may be."""
        tokens, k = self.cut(4096)
        return tokens // k

    def stretched(self, tokens: int | None = None, rank: int | None = None, layers: int | None = None) -> Sketch:
        """The same with sequences of so many tokens, adapters of this rank, or so many layers."""
        other = copy.copy(self)
        if tokens is not None:
            other._longer = tokens / self.of.tokens
        if rank is not None:
            share = rank / self.of.config.lora.r
            trained = {name: getattr(self._facts, name) * share for name in ("adapter", "optimizer", "gradient")}
            other._facts = replace(self._facts, **trained)
        if layers is not None:
            other._facts = replace(self._facts, layers=layers)
        return other


@dataclass(frozen=True, slots=True)
class _Facts:
    """Bytes that estimates are made of, but `expansion`: seconds to make a layer dense. For micro-batches as simulated.

    boundary            one hidden state between layers
    entry               what a micro-batch holds from its entry on
    dense               a layer's dense weights, where they are part of the working set
    loss                logits and the like, a token of the chunk
    ends, vocabulary    embeddings, head and norms; what of it can live on the host
    buffers, slot       for dense weights and, of it, the slot
    adapter, optimizer, gradient   of a layer
    elsewhere           of the base what is in no layer
    layer               a layer's four-bit weights
    """

    boundary: int
    entry: int
    dense: int
    loss: float
    ends: int
    vocabulary: int
    buffers: int
    slot: int
    adapter: float
    optimizer: float
    gradient: float
    elsewhere: int
    layer: int
    expansion: float
    layers: int
