"""The plan of a run: the fastest way to take a recipe's step on a machine, among those that fit.

The step is sketched, the choice is searched on the sketch, and what was chosen is simulated. Should the simulation find
that it takes more than the machine has, the search goes on with that much less. What the recipe fixes stays fixed, and
so does its effective batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from qlora.config import Config, MemoryConfig
from qlora.errors import PlanError
from qlora.machine import GIB
from qlora.model.adapters import trainable
from qlora.model.source import config_of
from qlora.plan.cards import this_machine
from qlora.plan.ledger import ACCELERATOR, HOST
from qlora.plan.periodic import Simulator
from qlora.plan.plan import Plan, device_bytes, does_not_fit
from qlora.plan.seconds import time_of
from qlora.plan.simulate import adapted, skeleton
from qlora.plan.sketch import LAYERS, Sketch
from qlora.plan.solve import Budget, Candidate, Choice, Estimate, NothingFits, Solution, Space, prices, solve
from qlora.plan.types import Machine, Option, Usage

MICRO_BATCHES = (4096, 1024)  # tokens of a micro-batch that are tried, beside a single row
TILES = (8192, 2048, 512)  # tokens of a tile
CHUNKS = (256, 64)  # tokens of the loss; more were no faster where it was measured
ROUNDS = 8  # of search and simulation


def plan(
    config: Config,
    machine: Machine | None = None,
    *,
    model_config: PreTrainedConfig | None = None,
    steps: int | None = None,
) -> Plan:
    """How to run a recipe on a machine, and what it will take there. `print(plan)` is the screen.

    machine       where; None: here, with what is free now. `cards.machine_for` makes one of a card's name
    model_config  of the base; None: read from where the recipe says, without its weights
    steps         optimizer steps of the run, where they are known

    Raises PlanError with the smallest changes that would fit where nothing fits; ModelError, AdapterError.
    """
    return Planner(config, machine, model_config=model_config, steps=steps).plan()


class Planner:
    """Plans one recipe on one machine. Arguments as of `plan`."""

    def __init__(
        self,
        config: Config,
        machine: Machine | None = None,
        *,
        model_config: PreTrainedConfig | None = None,
        steps: int | None = None,
        tokens: int | None = None,
        simulator: Simulator | None = None,
    ) -> None:
        """
        tokens     of the longest sequence, where the data is known; None: data.max_seq_length
        simulator  of the same recipe, for another machine of the kind; what it simulated is not simulated again
        """
        self.config, self.steps = config, steps
        if steps is None and config.training.max_steps > 0:
            self.steps = config.training.max_steps
        self.machine = machine or this_machine(Path(config.training.output_dir))
        self.simulator = simulator or Simulator(
            config,
            model_config or config_of(config.model),
            tokens or config.data.max_seq_length,
            HOST if self.machine.is_cpu else ACCELERATOR,
        )
        self.sketch = Sketch(self.simulator, config.memory, self.machine)
        self.budget = Budget(
            self.machine.host if self.machine.is_cpu else self.machine.device, self.machine.host, self.machine.disk
        )

    def plan(self) -> Plan:
        """Search, simulate, and search again where that says so. Without layers to place there is nothing to search."""
        if not self.simulator.can_be_cut or self.simulator.layers < LAYERS:
            usage = self.simulator.usage(self.config.memory)
            if self.over(usage):
                raise PlanError(does_not_fit(usage, self.machine))
            return self._of(self.config.memory, usage, Solution(Candidate({}, _NOTHING), (), 0, True), Space({}))
        spaces, budget, found = [self.space(), self.space(lean=True)], self.budget, None
        for asked in range(1, ROUNDS + 1):
            space, solution = self.chosen(spaces, budget)
            memory = self.memory_of(solution.best.choice)
            usage = self.simulator.usage(memory)
            over = self.over(usage)
            if not over:
                here = self._of(memory, usage, solution, space)
                found = here if found is None or here.time.seconds < found.time.seconds else found
            # What the sketch says too much or too little of the device is given to it, or taken.
            more = solution.best.estimate.device - device_bytes(usage, self.machine)
            if not solution.proven or (not over and (more < 0.02 * self.budget.device or budget != self.budget)):
                break
            # Less than what was chosen now, or it would be chosen again; and each time by more.
            said = solution.best.estimate
            taken = {what: min(getattr(budget, what), getattr(said, what)) - asked * n for what, n in over.items()}
            budget = replace(budget, **(taken or {"device": budget.device + more}))
        if found is not None:
            return found
        corrected = replace(self.budget, device=self.budget.device + more)
        suggestions = [(text, (n - more) / GIB) for text, n in self._would_do(corrected)]
        raise PlanError(does_not_fit(usage, self.machine, suggestions))

    def chosen(self, spaces: Sequence[Space], budget: Budget) -> tuple[Space, Solution]:
        """The best by the sketch, in the first of the spaces that has one; or else, not proven, what comes closest."""
        nearest: list[tuple[Space, Candidate]] = []
        for space in spaces:
            try:
                return space, solve(space, self.sketch.estimate, self.sketch.estimate, budget)
            except NothingFits as none:
                nearest.append((space, none.candidate))
        space, candidate = min(nearest, key=lambda each: budget.excess(each[1]))
        return space, Solution(candidate, (), 0, False)

    def over(self, usage: Usage) -> dict[str, int]:
        """By how many bytes a usage exceeds what the machine has; empty: it fits."""
        host = 0 if self.machine.is_cpu else usage.host_bytes
        return self.budget.over(Estimate(device_bytes(usage, self.machine), host, usage.file_bytes, 0))

    def space(self, free: str | None = None, lean: bool = False) -> Space:
        """What may be chosen.

        free  a key of `memory` that is, although the recipe fixes it
        lean  in smaller pieces, which cost time: they are looked at where nothing fits without
        """
        memory, layers, method = self.config.memory, self.simulator.layers, self.config.method
        numbers = tuple(range(layers, -1, -1))
        sizes = [*MICRO_BATCHES[self.machine.is_cpu :], 1]
        knobs: dict[str, tuple[Any, ...]] = {
            "activations": ("device", "host", "file"),
            "embeddings": ("device", "host"),
            "adapters": ("device", "host"),
            "micro_batch_tokens": tuple({self.sketch.cut(m)[1]: m for m in reversed(sizes)}.values())[::-1],
            "layer_tile_tokens": (None,),
            "loss_chunk_tokens": CHUNKS[:1],
            "layers_on_device": numbers if method == "qlora" else (layers,),
            "layers_kept": self._numbers_kept(),
            "layers_on_host": numbers,
        }
        if self.machine.is_cpu:  # the host is the device: what is elsewhere is in a file
            same = {"embeddings": ("device",), "adapters": ("device",), "layers_on_host": (0,)}
            knobs |= same | {"activations": ("device", "file")}
        if lean:
            knobs["loss_chunk_tokens"] = CHUNKS
        if lean and self.simulator.can_be_tiled:
            knobs["layer_tile_tokens"] = tuple(tile for tile in TILES if tile < self.sketch.longest) or (None,)
        if method == "full":
            knobs |= {"embeddings": ("device",), "adapters": ("device",)}
        for key in knobs.keys() & memory.model_fields_set - {free}:
            knobs[key] = (self._as_number(key, getattr(memory, key)),)
        if knobs["layers_kept"] != (0,) and len(knobs["layers_kept"]) == 1:
            knobs["layer_tile_tokens"] = (None,)
        return Space(knobs)

    def _numbers_kept(self) -> tuple[int, ...]:
        """Numbers of layers that may be kept: not each, and whole periods, which are simulated quickly."""
        period, most = self.simulator.pattern.period if self.simulator.pattern else 1, self.simulator.layers - 1
        apart = -(-most // (16 * period)) * period
        return tuple(dict.fromkeys([*range(most - most % period, -1, -apart), 0]))

    def _as_number(self, key: str, value: Any) -> Any:
        return self.simulator.layers if value is None and key in ("layers_on_device", "layers_on_host") else value

    def memory_of(self, choice: Choice) -> MemoryConfig:
        """A choice as the recipe's section."""
        layers, changes = self.simulator.layers, dict(choice)
        here = min(changes["layers_on_device"], layers)
        changes["layers_on_device"] = None if here == layers else here
        if here == layers or changes["layers_on_host"] >= layers - here:
            changes["layers_on_host"] = None
        if changes["layer_tile_tokens"] is not None:
            changes["layers_kept"] = 0
        return self.config.memory.model_copy(update=changes)

    def _of(self, memory: MemoryConfig, usage: Usage, solution: Solution, space: Space) -> Plan:
        whole = self.simulator.whole
        config = self.config.model_copy(update={"memory": memory})
        best = solution.best
        priced = prices(space, best, self.sketch.estimate) if best.choice else {}
        time = time_of(usage, self.machine.rates, self.machine.seconds_ratio)
        return Plan(
            config=config,
            machine=self.machine,
            model=self.config.model.model_name_or_path,
            parameters=sum(p.numel() for p in whole.parameters()),
            trainable=self._trainable(),
            usage=usage,
            time=time,
            steps=self.steps,
            fixed=frozenset(self.config.memory.model_fields_set - {"plan"}),
            reasons=self._reasons(best, space) if best.choice else {},
            runners_up=tuple(self._option(each, best, usage, time.seconds) for each in solution.runners_up),
            prices=tuple(self._option(each, best, usage, time.seconds) for each in priced.values()),
            would_fit=self._would_fit() if best.choice else {},
        )

    def _option(self, candidate: Candidate, best: Candidate, usage: Usage, seconds: float) -> Option:
        """What another choice would take: what was found for the best, and what the sketch says is different."""
        memory, chosen = (self.memory_of(each.choice).model_dump() for each in (candidate, best))
        e = candidate.estimate
        changes = {key: value for key, value in memory.items() if value != chosen[key]}
        return Option(
            changes,
            e.device - best.estimate.device + device_bytes(usage, self.machine),
            e.host - best.estimate.host + usage.host_bytes,
            e.file - best.estimate.file + usage.file_bytes,
            e.seconds / best.estimate.seconds * seconds,
        )

    def _trainable(self) -> int:
        """Trained parameters of the whole model."""
        few = self.simulator.shallow
        layers = self.simulator.layers

        def count(n: int) -> int:
            return sum(p.numel() for p in trainable(adapted(skeleton(self.config, few(n)), self.config)).values())

        if self.simulator.pattern is None or self.simulator.pattern.period > 1 or layers < 3:
            return count(layers)
        two, three = count(2), count(3)
        return two + (three - two) * (layers - 2)

    def _reasons(self, best: Candidate, space: Space) -> dict[str, str]:
        """What each choice that is not the simplest gives, and what it costs."""
        reasons = {}
        for knob, values in space.knobs.items():
            chosen = best.choice[knob]
            other = values[-1] if knob == "layers_kept" else values[0]
            if len(values) == 1 or chosen == other:
                continue
            instead = self.sketch.estimate(best.choice | {knob: other})
            saved = (instead.device - best.estimate.device) / GIB
            slower = best.estimate.seconds / instead.seconds - 1
            if knob == "layers_kept":
                reasons[knob] = f"{-saved:.2f} GiB for {-slower:.0%} less time"
            else:
                reasons[knob] = f"{saved:.2f} GiB less" + (f", {slower:+.1%} time" if abs(slower) > 5e-4 else "")
        return reasons

    def _would_fit(self) -> dict[str, str]:
        """How far the same machine would go, by the sketch."""
        space = self.space()

        def fits(sketch: Sketch, budget: Budget = self.budget) -> bool:
            return self._solved(_leanest(space), sketch, budget) is not None

        longest = _largest(lambda n: fits(self.sketch.stretched(tokens=n)), self.simulator.tokens)
        found = {"longest sequence": f"about {longest:,} tokens"}
        if self.config.method != "full":
            rank = _largest(lambda r: fits(self.sketch.stretched(rank=r)), self.config.lora.r)
            found["largest rank"] = f"about {rank:,}"
        in_memory = replace(self.budget, file=0)
        if each := sum(shape.numel() for shape in self.sketch.a_layer.values()):
            layers = _largest(lambda n: fits(self.sketch.stretched(layers=n), in_memory), self.simulator.layers)
            if layers > self.simulator.layers:
                parameters = sum(p.numel() for p in self.simulator.whole.parameters())
                parameters += (layers - self.simulator.layers) * each
                found["largest model as wide, without a disk"] = f"about {parameters / 1e9:.3g}B, {layers:,} layers"
        return found

    def _would_do(self, budget: Budget) -> Iterator[tuple[str, int]]:
        """Changes to the recipe that would fit, with the bytes of the device that are needed then."""
        for key in sorted(self.config.memory.model_fields_set & self.space().knobs.keys()):
            found = self._solved(self.space(free=key), self.sketch, budget)
            if found is not None:
                value = self.memory_of(found.choice).model_dump()[key]
                yield f"memory.{key}: {'null' if value is None else value}", found.estimate.device
        tokens = self.simulator.tokens // 2
        while tokens >= 128:
            found = self._solved(_leanest(self.space(lean=True)), self.sketch.stretched(tokens=tokens), budget)
            if found is not None:
                yield f"data.max_seq_length: {tokens}", found.estimate.device
                return
            tokens //= 2

    def _solved(self, space: Space, sketch: Sketch, budget: Budget | None = None) -> Candidate | None:
        try:
            return solve(space, sketch.estimate, sketch.estimate, budget or self.budget).best
        except NothingFits:
            return None


_NOTHING = Estimate(0, 0, 0, 0.0)


def _leanest(space: Space) -> Space:
    """Of each dear knob the first value and the last, of the layers' places the ends: to know whether anything fits."""
    return Space({knob: tuple(dict.fromkeys((values[0], values[-1]))) for knob, values in space.knobs.items()})


def _largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest number, to about 3%, that fits where `start` does; at most 1000 times as much."""
    low = start
    while low < 1000 * start and fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(low // 32, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
