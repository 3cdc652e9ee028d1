"""The training step itself, run on fake tensors: what it would hold, move and compute, counted while it runs.

Every tensor has a shape, a dtype and a storage, and no bytes; a `Ledger` counts. So nothing is estimated that code
computes: what the step does (streaming, tiles, chunks) is what is counted, and where the step changes, the figures
change with it.

The simulated accelerator is the device `cpu:1`, which does not exist, and the host is `cpu`, as ever: to PyTorch they
are two devices, so what has to be moved is moved, and mixing them is an error. (Fake `cuda` tensors need a PyTorch that
was built with CUDA.) Nothing of a model is downloaded or made: its configuration is enough.

Numbers that a step reads off its tensors are all 1 here, and every token carries loss: both take the most memory.

A step of 80 layers takes minutes this way; `periodic` finds the same figures from a few layers.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from qlora.config import Config
from qlora.errors import ModelError
from qlora.model.adapters import attach, trainable
from qlora.model.batch import Batch
from qlora.model.blocks import Blocks, CannotCut, cut
from qlora.model.homes import READERS, Disk, LayerHome, OnFile, padded
from qlora.model.load import build_skeleton, four_bit_of, four_bit_targets
from qlora.model.nf4 import FourBit, FourBitWeight, four_bit_weights, install, parts_of, quantize
from qlora.model.residency import Residency
from qlora.model.shards import CHUNK, Layout
from qlora.model.store import Groups, Store, groups_of, tiers_of
from qlora.model.transfer import Event, Lane, host_buffer
from qlora.plan.allocator import CachingAllocator
from qlora.plan.ledger import ACCELERATOR, HOST, WORKING_SET, Label, Ledger, stored
from qlora.plan.types import PHASES, Phase, Usage
from qlora.train import activations, optim
from qlora.train.checkpoint import Run
from qlora.train.loop import Loop
from qlora.train.step import LayerMajor, MicroBatchMajor, Step

BASE, DENSE, ENDS, ADAPTERS = "base", "dense buffers", "embeddings, head, norms", "adapters"  # categories
GRADIENTS, OPTIMIZER, BOUNDARIES, LOSS = "gradients", "optimizer state", "boundary activations", "head and loss"


class CannotSimulate(ModelError):
    """A model, or a way to run it, that fake tensors do not know."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a step took, by what it was doing.

    device, host  the most that was held there, by category
    phases        what was computed and moved
    file          bytes on disk, by category
    slack         bytes that torch's allocator held beside those on the device
    entry         bytes of the working set that each micro-batch holds from its entry to the step's end
    """

    device: Mapping[Label, Mapping[str, int]]
    host: Mapping[Label, Mapping[str, int]]
    phases: Mapping[Label, Phase]
    file: Mapping[str, int]
    slack: int
    entry: int
    tokens: int
    layers: int
    kept: int
    order: str

    def usage(self) -> Usage:
        """The step as a whole."""
        at, device = _most(self.device)
        merged = {name: Phase() for name in PHASES}
        for (name, _), phase in self.phases.items():
            into = merged.setdefault(name, Phase())
            into.work.update(phase.work)
            into.host_work.update(phase.host_work)
            into.moved.update(phase.moved)
        return Usage(
            device=dict(device),
            host=dict(_most(self.host)[1]),
            file={category: n for category, n in self.file.items() if n},
            moment=moment(at),
            slack=self.slack,
            phases=merged,
            tokens=self.tokens,
            layers=self.layers,
            order=self.order,
        )


def _most(held: Mapping[Label, Mapping[str, int]]) -> tuple[Label, Mapping[str, int]]:
    return max(held.items(), key=lambda item: sum(item[1].values()), default=(("", 0), {}))


def moment(at: Label) -> str:
    """What the step is doing, for people."""
    name, layer = at
    said = {"forward": f"forward of layer {layer}", "backward": f"backward of layer {layer}"}
    return said.get(name) or {"turn": "loss and backward of the last layer"}.get(name, name)


def simulate(
    config: Config,
    model_config: PreTrainedConfig,
    micro_batches: Sequence[tuple[int, int]],
    document: int | None = None,
    device: torch.device = ACCELERATOR,
) -> Usage:
    """One optimizer step of a recipe, in the steady state: the optimizer's state and all buffers are there.

    model_config   the model's configuration; its weights are not needed
    micro_batches  [B, T] of each of the step's micro-batches, unpadded
    document       tokens of a document; the last of a row may be shorter. None: each row is one
    device         HOST simulates training on the CPU

    Raises ModelError, AdapterError where the recipe does not fit the model.
    """
    return record(config, model_config, micro_batches, document, device).usage()


def record(
    config: Config,
    model_config: PreTrainedConfig,
    micro_batches: Sequence[tuple[int, int]],
    document: int | None = None,
    device: torch.device = ACCELERATOR,
    like: Blocks | None = None,
    ledger: Ledger | None = None,
) -> Record:
    """`simulate`, in detail.

    like    a cut of a model of its make; see `cut_of`
    ledger  counts instead of a new one

    Raises CannotSimulate too.
    """
    with _simulating(config):
        return _recorded(config, model_config, micro_batches, document, device, like, ledger or Ledger())


@contextmanager
def _simulating(config: Config) -> Iterator[None]:
    """Turn what fake tensors fail at into CannotSimulate. They log it too, with a traceback, which is kept back."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:  # what torch raises for an operation without fake kernels
        said = str(error).strip().split("\n")[0]
        raise CannotSimulate(f"{config.model.model_name_or_path}: its step cannot be simulated: {said}") from error
    finally:
        log.disabled = before


def _recorded(
    config: Config,
    model_config: PreTrainedConfig,
    micro_batches: Sequence[tuple[int, int]],
    document: int | None,
    device: torch.device,
    like: Blocks | None,
    ledger: Ledger,
) -> Record:
    # bitsandbytes makes its table of codes at first use, from numbers.
    quantize(torch.zeros(64, 64), FourBit())
    model = adapted(skeleton(config, model_config), config)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        disk = _materialize(model, config, device, ledger)
        model.train()
        step = _step(model, config, device, ledger, disk, like)
        parameters = trainable(model)
        batches = [_batch(rows, tokens, document or tokens, device) for rows, tokens in micro_batches]
        once = config.training.model_copy(update={"max_steps": 1})
        loop = Loop(step, parameters, lambda epoch: batches, once, Run(), lambda *_, **__: None)
        _warm_up(step, loop, ledger)
        ledger.start()
        ledger.at = ("prologue", 0)
        result = step(batches, 1)
        ledger.at = ("optimizer", 0)
        for parameter in parameters.values():
            ledger.name(parameter.grad, GRADIENTS)
        loop.update(result, batches, 1)
    on_device, on_host = (
        {at: peak.by_category for at, peak in ledger.peaks.get(where, {}).items()} for where in (device, HOST)
    )
    phases = ledger.phases
    if device == HOST:
        on_host, phases = {}, {at: Phase(phase.host_work, moved=phase.moved) for at, phase in phases.items()}
    return Record(
        device=on_device,
        host=on_host,
        phases=phases,
        file=dict(disk.held),
        slack=ledger.allocator.peak_reserved - ledger.allocator.peak_allocated,
        entry=step.entered // len(micro_batches) if isinstance(step, Watched) else 0,
        tokens=sum(rows * tokens for rows, tokens in micro_batches),
        layers=len(step.blocks) if isinstance(step, LayerMajor) else 0,
        kept=step.layers_kept if isinstance(step, LayerMajor) else 0,
        order=step.order,
    )


def skeleton(config: Config, model_config: PreTrainedConfig) -> PreTrainedModel:
    """The base model on the meta device. Raises ModelError."""
    return build_skeleton(model_config, config, config.model.model_name_or_path)


def adapted(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    """A skeleton with its four-bit weights, which are nowhere yet, and its adapter."""
    meta = torch.device("meta")
    with meta:
        if config.method == "qlora":
            four_bit = four_bit_of(config.quantization)
            for name, shape in four_bit_targets(model).items():
                path, _, leaf = name.rpartition(".")
                weight = FourBitWeight(shape, four_bit, meta, name)
                weight.held = _parts(weight)
                install(model.get_submodule(path), leaf, weight)
        model.requires_grad_(config.method == "full")
        if config.method != "full":
            # Another initialisation gives other values, in tensors of the same shapes.
            attach(model, config.lora.model_copy(update={"init_lora_weights": True}), config.training.seed)
    return model


def _materialize(model: PreTrainedModel, config: Config, device: torch.device, ledger: Ledger) -> _Disk:
    """Give the model fake tensors, each where the recipe wants it."""
    fakes: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    with ledger.naming(ADAPTERS if tensor.requires_grad else ENDS):
                        fake = torch.empty_like(tensor, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = cast(Any, fakes[id(tensor)])
    disk = _Disk(device, ledger)
    weights = four_bit_weights(model)
    if weights:
        groups = groups_of(model, {weight.name: weight.shape for weight in weights})
        with ledger.naming(BASE):
            store = _Store(groups, tiers_of(groups, config.memory), weights[0].four_bit, device, disk)
            for weight in weights:
                weight.device, weight.home = device, store.home_of(weight)
                weight.held = None if weight.home else _parts(weight)
    return disk


class Places(NamedTuple):
    """Bytes of the four-bit base at rest, and what torch's allocator holds beside those on the device."""

    device: int
    host: int
    file: int
    slack: int


def at_rest(config: Config, groups: Groups, tiers: Mapping[str, str], device: torch.device) -> Places:
    """The four-bit base of a model in the places where the real store puts it."""
    four_bit, ledger, allocator = four_bit_of(config.quantization), Ledger(), CachingAllocator()
    with FakeTensorMode(), ledger, ledger.naming(BASE):
        disk = _Disk(device, ledger)
        away = {group: inside for group, inside in groups.items() if tiers[group] != "device"}
        store = _Store(away, {group: tiers[group] for group in away}, four_bit, device, disk)
        on_host = ledger.live[HOST][BASE] if HOST in ledger.live else 0
        del store
    on_device = 0
    for group, inside in groups.items():
        for shape in inside.values() if tiers[group] == "device" else ():
            for dtype, part in parts_of(shape, four_bit).values():
                nbytes = stored(math.prod(part) * dtype.itemsize, device)
                allocator.malloc(nbytes)
                on_device += nbytes
    return Places(
        device=on_device + (on_host if device == HOST else 0),
        host=0 if device == HOST else on_host,
        file=disk.held[BASE],
        slack=0 if device == HOST else allocator.reserved - allocator.allocated,
    )


def _parts(weight: FourBitWeight) -> dict[str, torch.Tensor]:
    kinds = parts_of(weight.shape, weight.four_bit)
    return {part: torch.empty(shape, dtype=dtype, device=weight.device) for part, (dtype, shape) in kinds.items()}


def cut_of(config: Config, model_config: PreTrainedConfig) -> Blocks | None:
    """How a model is cut; None where it cannot be. Proving that is half of the work of simulating a few layers."""
    quantize(torch.zeros(64, 64), FourBit())
    model = adapted(skeleton(config, model_config), config)
    ledger = Ledger()
    with contextlib.suppress(CannotCut), _simulating(config), FakeTensorMode(allow_non_fake_inputs=True), ledger:
        _materialize(model, config, ACCELERATOR, ledger)
        return cut(model)


def _step(
    model: PreTrainedModel, config: Config, device: torch.device, ledger: Ledger, disk: _Disk, like: Blocks | None
) -> Step:
    memory, seed = config.memory, config.training.seed
    if memory.order != "standard":
        with contextlib.suppress(CannotCut), ledger.naming(ENDS):
            blocks = like.again(model) if like is not None else cut(model)
            step = Watched(blocks, Residency(blocks.layers, device), memory, seed)
            step.watched_by(ledger, disk)
            for parameter in model.parameters():
                ledger.settle(parameter)
                if parameter.requires_grad:
                    ledger.name(parameter, ADAPTERS)
            return step
    return MicroBatchMajor(model, Residency([model], device), memory.loss_chunk_tokens, seed)


def _batch(rows: int, tokens: int, document: int, device: torch.device) -> Batch:
    ids = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
    documents = tuple(min(document, tokens - start) for start in range(0, tokens, document))
    return Batch(ids, ids.clone(), ids.clone(), documents=(documents,) * rows)


def _warm_up(step: Step, loop: Loop, ledger: Ledger) -> None:
    """Let there be what a first step leaves behind."""
    with ledger.naming(DENSE):
        if isinstance(step, LayerMajor):
            layers = enumerate(step.blocks.layers)
            elsewhere = [i for i, layer in layers if any(weight.home for weight in four_bit_weights(layer))]
            with step.residency.visit(elsewhere[0] if elsewhere else 0):
                pass
    with ledger.naming(OPTIMIZER):
        optim.settle(loop.optimizer, loop.parameters.values())


class Watched(LayerMajor):
    """The step, which says meanwhile what it is doing. Nothing of it is done in another way."""

    entered = 0  # bytes of the working set once all micro-batches have entered

    @classmethod
    def of(cls, step: LayerMajor, ledger: Ledger) -> Watched:
        """A step as it is, over the same model and in the same places, watched."""
        watched = cls.__new__(cls)
        vars(watched).update(vars(step))
        watched.watched_by(ledger)
        return watched

    def watched_by(self, ledger: Ledger, disk: _Disk | None = None) -> None:
        """disk: stands in for the one that activations would go to."""
        self._ledger = ledger
        if disk is not None and isinstance(self.activations, activations.OnFile):
            self.activations, self.gradients = _OnFile(self.device, disk), _OnFile(self.device, disk, passing=True)
        self.activations = cast(Any, _NamedActivations(self.activations, ledger))
        self.gradients = cast(Any, _NamedActivations(self.gradients, ledger))

    def _enter(self, *args: Any) -> Any:
        entries = super()._enter(*args)
        self.entered = self._ledger.live[self.device][WORKING_SET]
        return entries

    def _route(self, order: Sequence[int]) -> Iterator[AbstractContextManager[None]]:
        last = len(self.blocks) - 1
        for at, visit in enumerate(super()._route(order)):
            way = "turn" if order[at] == last else "forward" if at < last else "backward"
            yield self._watched(visit, order[at], way)

    @contextmanager
    def _watched(self, visit: AbstractContextManager[None], i: int, way: str) -> Iterator[None]:
        self._ledger.at = (way, i)
        with visit:
            yield
        for parameter in self.blocks.layers[i].parameters():
            self._ledger.name(parameter.grad, GRADIENTS)

    def _loss(self, *args: Any, **kwargs: Any) -> Any:
        with self._ledger.naming(LOSS):
            loss, gradient = super()._loss(*args, **kwargs)
        self._ledger.name(gradient, WORKING_SET)
        return loss, gradient


class _NamedActivations:
    """Boundary activations under their name in the ledger."""

    def __init__(self, inner: activations.Activations, ledger: Ledger) -> None:
        self._inner, self._ledger = inner, ledger
        self.take = inner.take

    def __enter__(self) -> _NamedActivations:
        return self

    def __exit__(self, *_: object) -> None:
        self._inner.end()

    def begin(self, like: Sequence[torch.Tensor], layers: int) -> None:
        with self._ledger.naming(BOUNDARIES):
            self._inner.begin(like, layers)

    def put(self, i: int, j: int, x: torch.Tensor) -> None:
        self._ledger.name(x, BOUNDARIES)
        self._inner.put(i, j, x)


class _OnFile(activations.OnFile):
    """Boundary activations in a file that is not there: they come as far as host memory."""

    def __init__(self, device: torch.device, disk: _Disk, passing: bool = False) -> None:
        super().__init__(device, ".", passing)
        self._disk = disk

    def _reserve(self, nbytes: int, largest: int) -> None:
        self._disk.held[BOUNDARIES] += nbytes
        self._staged = host_buffer(4 * largest, self.device)  # as many as the real one

    def _send(self, place: slice, source: torch.Tensor, after: Event) -> Event:
        self._disk.note("to file", source.numel())
        return self._lane.copy(self._staged[: source.numel()], source, after)

    def _fetch(self, place: slice, to: torch.Tensor, after: Event) -> Callable[[], Event]:
        self._disk.note("from file", to.numel())
        arrived = self._lane.copy(to, self._staged[: to.numel()], after)
        return lambda: arrived


class _Disk(Disk):
    """A disk with nothing on it: what is read off it is counted.

    held  bytes on it, by what they are for
    """

    def __init__(self, device: torch.device, ledger: Ledger) -> None:
        super().__init__(device)
        self.held, self._ledger = Counter[str](), ledger
        self._passing: torch.Tensor | None = None

    def note(self, way: str, nbytes: int) -> None:
        """So many bytes go "from file" or "to file" in what the program is doing."""
        self._ledger.phases.setdefault(self._ledger.at, Phase()).moved[way] += nbytes

    def read(self, reader: Any, slot: torch.Tensor, lane: Lane, after: Event) -> Future[Event]:
        """reader: the number of bytes."""
        self.note("from file", reader)
        if self._device != HOST:
            if self._passing is None:
                with self._ledger.naming("staging"):
                    self._passing = host_buffer(READERS * CHUNK, self._device)
            for start in range(0, reader, CHUNK):
                end = min(start + CHUNK, reader)
                lane.copy(slot[start:end], self._passing[: end - start], after)
        done: Future[Event] = Future()
        done.set_result(lane.mark())
        return done


class _LayerOnFile(OnFile):
    """A layer that is read off a disk with nothing on it."""

    def __init__(self, layout: Layout, disk: _Disk) -> None:
        super().__init__(layout, disk)
        self.reader = cast(Any, padded(layout.nbytes))

    def parts(self, weight: FourBitWeight) -> dict[str, torch.Tensor]:
        return _parts(weight)


class _Store(Store):
    """Where a model's four-bit weights would go."""

    def __init__(
        self, groups: Groups, tiers: Mapping[str, str], four_bit: FourBit, device: torch.device, disk: _Disk
    ) -> None:
        self._planned = disk
        super().__init__(groups, tiers, four_bit, device)

    def home_of(self, weight: FourBitWeight) -> LayerHome | None:
        return self._homes.get(self._group[weight.name])

    def _check_host(self, on_host: Sequence[str]) -> None:
        """This machine is not the one that is asked about."""

    def _make_homes(self) -> dict[str, LayerHome]:
        homes = super()._make_homes()
        for group, home in homes.items():
            if isinstance(home, OnFile):
                homes[group] = _LayerOnFile(home.layout, self._planned)
                self._planned.held[BASE] += padded(home.layout.nbytes)
        return homes
