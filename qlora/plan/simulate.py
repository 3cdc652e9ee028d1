"""The training step itself, run on fake tensors: what it would hold, move and compute, counted while it runs.

Every tensor has a shape, a dtype and a storage, and no bytes. A dispatch mode counts storages as they are born and as
they die, copies between host and device, and FLOPs. So nothing is estimated that code computes: what the step does
(streaming, tiles, chunks) is what is counted, and where the step changes, the figures change with it.

The simulated accelerator is the device `cpu:1`, which does not exist, and the host is `cpu`, as ever: to PyTorch they
are two devices, so what has to be moved is moved, and mixing them is an error. (Fake `cuda` tensors need a PyTorch that
was built with CUDA.) Nothing of a model is downloaded or made: its configuration is enough.

Numbers that a step reads off its tensors are all 1 here, and every token carries loss: both take the most memory.

What is not in the figures: the CUDA context with its libraries' workspaces, about 0.5 GB; holes between blocks.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qlora.config import Config
from qlora.model.adapters import attach, trainable
from qlora.model.batch import Batch
from qlora.model.blocks import CannotCut, cut
from qlora.model.homes import READERS, Disk, LayerHome, OnFile, padded
from qlora.model.load import four_bit_of, four_bit_targets
from qlora.model.nf4 import FourBit, FourBitWeight, four_bit_weights, install, parts_of, quantize
from qlora.model.residency import Residency
from qlora.model.shards import CHUNK, Layout
from qlora.model.store import Groups, Store, groups_of, tiers_of
from qlora.model.transfer import Event, Lane, host_buffer
from qlora.train import activations
from qlora.train.loop import Loop
from qlora.train.step import LayerMajor, MicroBatchMajor, Step

HOST = torch.device("cpu")
ACCELERATOR = torch.device("cpu", 1)
BLOCK = 512  # bytes; the CUDA allocator hands out memory in multiples of it

AT_WORK, BOUNDARIES, ADAPTERS = "layer at work", "boundary activations", "adapters"  # categories


@dataclass(frozen=True, slots=True)
class Usage:
    """What one optimizer step takes.

    device, host  bytes at the moment when most were held there, by what they are for
    file          bytes that the step has on disk, by what they are for
    moment        when most was held on the device
    flops         floating point operations of the step; causal attention counts the half that is computed
    moved         bytes of the step by way: "host to device", "device to host", "from file", "to file"
    tokens        of the step's micro-batches
    order         "layer-major", or "standard" for a model that cannot be cut
    """

    device: dict[str, int]
    host: dict[str, int]
    file: dict[str, int]
    moment: str
    flops: int
    moved: dict[str, int]
    tokens: int
    order: str = "layer-major"

    @property
    def peak_bytes(self) -> int:
        """Most bytes on the device at one time."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """Most bytes in host memory at one time, what the program itself needs aside."""
        return sum(self.host.values())

    @property
    def file_bytes(self) -> int:
        """Bytes on disk that the step reads or writes."""
        return sum(self.file.values())

    def seconds(self, flops: float, host: float = math.inf, file: float = math.inf) -> float:
        """How long the step takes where computation and transfers hide behind each other wholly.

        flops       a second, as matrix products reach them
        host, file  bytes a second between host and device, each way, and from and to the file
        """
        on_bus = max(self.moved.get("host to device", 0), self.moved.get("device to host", 0))
        on_disk = self.moved.get("from file", 0) + self.moved.get("to file", 0)
        return max(self.flops / flops, on_bus / host, on_disk / file)


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
    # bitsandbytes makes its table of codes at first use, from numbers.
    quantize(torch.zeros(64, 64), FourBit())
    model = _structure(config, model_config)
    ledger = Ledger()
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        disk = _materialize(model, config, device, ledger)
        model.train()
        step = _step(model, config, device, ledger, disk)
        parameters = trainable(model)
        batches = [_batch(rows, tokens, document or tokens, device) for rows, tokens in micro_batches]
        once = config.training.model_copy(update={"max_steps": 1})
        loop = Loop(step, parameters, lambda epoch: batches, once, {}, lambda *_, **__: None)
        _warm_up(step, loop, ledger)
        ledger.start()
        disk.moved.clear()
        result = step(batches, 1)
        ledger.moment = "optimizer"
        for parameter in parameters.values():
            ledger.name(parameter.grad, "gradients")
        loop.update(result, batches, 1)
    device_peak, host_peak = ledger.peaks.get(device), ledger.peaks.get(HOST)
    return Usage(
        device=device_peak.by_category if device_peak else {},
        host=host_peak.by_category if host_peak and device != HOST else {},
        file=dict(disk.held),
        moment=device_peak.moment if device_peak else "",
        flops=ledger.flops,
        moved={way: n for way, n in (ledger.moved + disk.moved).items() if n},
        tokens=sum(rows * tokens for rows, tokens in micro_batches),
        order=step.order,
    )


class _Record(NamedTuple):
    nbytes: int
    device: torch.device


@dataclass(slots=True)
class Peak:
    """The most that was held on one device, and what it was."""

    nbytes: int = 0
    by_category: dict[str, int] = field(default_factory=dict)
    moment: str = ""


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage that is alive, on each device, by category; real tensors' as well as fakes'.

    category  of storages that are born now
    moment    what the program is doing, for people
    """

    def __init__(self) -> None:
        super().__init__()
        self.category, self.moment = AT_WORK, ""
        self.live: dict[torch.device, Counter[str]] = {}
        self.total: Counter[torch.device] = Counter()
        self.peaks: dict[torch.device, Peak] = {}
        self.moved: Counter[str] = Counter()
        self.flops = 0
        self._records: dict[int, _Record] = {}
        self._categories: dict[int, str] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}

    def start(self) -> None:
        """Count peaks, transfers and FLOPs from here on."""
        self.flops, self.moved = 0, Counter()
        self.peaks = {
            device: Peak(self.total[device], dict(categories), "before the step")
            for device, categories in self.live.items()
        }

    @contextmanager
    def naming(self, category: str) -> Iterator[None]:
        """What is born inside is of this category."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    def name(self, tensor: torch.Tensor | None, category: str) -> None:
        """What this tensor stores is of another category from here on."""
        if tensor is None:
            return
        key = tensor.untyped_storage()._cdata
        if key not in self._records:
            self._born(tensor, None)
        nbytes, device = self._records[key]
        live = self.live[device]
        live[self._categories[key]] -= nbytes
        live[category] += nbytes
        self._categories[key] = category

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fake = any(issubclass(kind, FakeTensor) for kind in types)
        if fake:
            for arg in args:
                self.settle(arg)
            if func is torch.ops.prim.device.default:
                return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
            if func in _ANSWERS:
                return _ANSWERS[func](*args)
            if func is torch.ops.aten.nonzero.default:
                func, args = torch.ops.aten.new_empty.default, (args[0], [args[0].numel(), args[0].dim()])
                kwargs = {"dtype": torch.int64}
        self._note_workspace(func, args)
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, torch.Tensor):
                self._born(leaf, func)
        self._note_work(func, args, kwargs or {}, out)
        return out

    def settle(self, arg: Any) -> None:
        """A fake tensor remembers its device by itself; after `x.data = y` it is where y is."""
        if isinstance(arg, FakeTensor):
            record = self._records.get(arg.untyped_storage()._cdata)
            if record is not None and arg.fake_device != record.device:
                arg.fake_device = record.device
        elif isinstance(arg, list | tuple):
            for each in arg:
                self.settle(each)

    def _born(self, tensor: torch.Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._records:
            return
        nbytes = -(-storage.nbytes() // BLOCK) * BLOCK
        device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        self._records[key], self._categories[key] = _Record(nbytes, device), self.category
        self._alive[key] = weakref.ref(storage, lambda _: self._died(key))
        self.live.setdefault(device, Counter())[self.category] += nbytes
        self.total[device] += nbytes
        self._note_peak(device, func)

    def _died(self, key: int) -> None:
        nbytes, device = self._records.pop(key)
        self.live[device][self._categories.pop(key)] -= nbytes
        self.total[device] -= nbytes
        del self._alive[key]

    def _note_peak(self, device: torch.device, func: Any, more: int = 0) -> None:
        peak = self.peaks.setdefault(device, Peak())
        if self.total[device] + more > peak.nbytes:
            peak.nbytes = self.total[device] + more
            peak.by_category = {category: n for category, n in self.live[device].items() if n}
            if more:
                peak.by_category["kernel's workspace"] = more
            peak.moment = f"{self.moment}: {func}" if self.moment else str(func)

    def _note_workspace(self, func: Any, args: Any) -> None:
        """What a GPU's kernel allocates inside, where no tensor shows it: attention's backward."""
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            query, key = args[1], args[2]
            device = query.fake_device if isinstance(query, FakeTensor) else query.device
            outputs = query.nbytes + 2 * key.nbytes
            # FlashAttention sums the queries' gradient in fp32, and makes keys' and values' for each query head.
            expanded = 2 * query.nbytes if query.shape[1] != key.shape[1] else 0
            self._note_peak(device, func, outputs + 4 * query.numel() + expanded)

    def _note_work(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func is torch.ops.aten.copy_.default:
            self._note_move(args[1], args[0])
        elif func is torch.ops.aten._to_copy.default:
            self._note_move(args[0], out)
        formula = _FLOPS.get(func) or flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)

    def _note_move(self, source: torch.Tensor, to: torch.Tensor) -> None:
        if isinstance(source, FakeTensor) and isinstance(to, FakeTensor) and source.fake_device != to.fake_device:
            self.moved["host to device" if source.fake_device == HOST else "device to host"] += source.nbytes


_ANSWERS: dict[Any, Callable[..., Any]] = {  # of operations whose results are no tensors
    torch.ops.aten._local_scalar_dense.default: lambda x: 1.0 if x.is_floating_point() else 1,
    torch.ops.aten.allclose.default: lambda *_, **__: True,
    torch.ops.aten.equal.default: lambda *_: True,
    # bitsandbytes' fake kernel compares the shape of `out` with a list, and finds that they differ.
    torch.ops.bitsandbytes.dequantize_4bit.out: lambda *_: None,
}


def _causal(flops: int, is_causal: bool) -> int:
    return flops // 2 if is_causal else flops


def _attention_flops(q: Any, k: Any, v: Any, dropout: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    return _causal(sdpa_flop_count(q.shape, k.shape, v.shape), is_causal)


def _attention_backward_flops(
    g: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dropout: float, is_causal: bool, **_: Any
) -> int:
    return _causal(sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape), is_causal)


# The CPU's attention, which fake tensors take, has no formula in PyTorch.
_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward_flops,
}


def _structure(config: Config, model_config: PreTrainedConfig) -> PreTrainedModel:
    """The model with its adapter, all on the meta device."""
    meta = torch.device("meta")
    with meta:
        model = AutoModelForCausalLM.from_config(
            model_config,
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=config.model.attn_implementation,
        )
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
                    with ledger.naming(ADAPTERS if tensor.requires_grad else "embeddings, head, norms"):
                        fake = torch.empty_like(tensor, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = cast(Any, fakes[id(tensor)])
    disk = _Disk(device, ledger)
    weights = four_bit_weights(model)
    if weights:
        groups = groups_of(model, {weight.name: weight.shape for weight in weights})
        with ledger.naming("base"):
            store = _Store(groups, tiers_of(groups, config.memory), weights[0].four_bit, device, disk)
            for weight in weights:
                weight.device, weight.home = device, store.home_of(weight)
                weight.held = None if weight.home else _parts(weight)
    return disk


def _parts(weight: FourBitWeight) -> dict[str, torch.Tensor]:
    kinds = parts_of(weight.shape, weight.four_bit)
    return {part: torch.empty(shape, dtype=dtype, device=weight.device) for part, (dtype, shape) in kinds.items()}


def _step(model: PreTrainedModel, config: Config, device: torch.device, ledger: Ledger, disk: _Disk) -> Step:
    memory, seed = config.memory, config.training.seed
    if memory.order != "standard":
        with contextlib.suppress(CannotCut), ledger.naming("embeddings, head, norms"):
            blocks = cut(model)
            step = _Watched(blocks, Residency(blocks.layers, device), memory, seed)
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
    with ledger.naming("slot and dense buffers"):
        if isinstance(step, LayerMajor):
            layers = enumerate(step.blocks.layers)
            elsewhere = [i for i, layer in layers if any(weight.home for weight in four_bit_weights(layer))]
            with step.residency.visit(elsewhere[0] if elsewhere else 0):
                pass
    with ledger.naming("optimizer's state"):
        for parameter in loop.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=True)


class _Watched(LayerMajor):
    """The step, which says meanwhile what it is doing. Nothing of it is done in another way."""

    def watched_by(self, ledger: Ledger, disk: _Disk) -> None:
        self._ledger = ledger
        if isinstance(self.activations, activations.OnFile):
            self.activations, self.gradients = _OnFile(self.device, disk), _OnFile(self.device, disk, passing=True)
        self.activations = cast(Any, _NamedActivations(self.activations, ledger))
        self.gradients = cast(Any, _NamedActivations(self.gradients, ledger))

    def _route(self, order: Sequence[int]) -> Iterator[AbstractContextManager[None]]:
        for at, visit in enumerate(super()._route(order)):
            yield self._watched(visit, order[at], "forward" if at < len(self.blocks) - 1 else "backward")

    @contextmanager
    def _watched(self, visit: AbstractContextManager[None], i: int, way: str) -> Iterator[None]:
        with visit:
            self._ledger.moment = f"{way} of layer {i}"
            yield
        for parameter in self.blocks.layers[i].parameters():
            self._ledger.name(parameter.grad, "gradients")

    def _loss(self, *args: Any, **kwargs: Any) -> Any:
        before, self._ledger.moment = self._ledger.moment, "loss"
        with self._ledger.naming("loss"):
            loss, gradient = super()._loss(*args, **kwargs)
        self._ledger.name(gradient, AT_WORK)
        self._ledger.moment = before
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
        self._disk.moved["to file"] += source.numel()
        return self._lane.copy(self._staged[: source.numel()], source, after)

    def _fetch(self, place: slice, to: torch.Tensor, after: Event) -> Callable[[], Event]:
        self._disk.moved["from file"] += to.numel()
        arrived = self._lane.copy(to, self._staged[: to.numel()], after)
        return lambda: arrived


class _Disk(Disk):
    """A disk with nothing on it: what is read off it is counted.

    held   bytes on it, by what they are for
    moved  bytes "from file" and "to file"
    """

    def __init__(self, device: torch.device, ledger: Ledger) -> None:
        super().__init__(device)
        self.held, self.moved, self._ledger = Counter[str](), Counter[str](), ledger
        self._passing: torch.Tensor | None = None

    def read(self, reader: Any, slot: torch.Tensor, lane: Lane, after: Event) -> Future[Event]:
        """reader: the number of bytes."""
        self.moved["from file"] += reader
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
                self._planned.held["base"] += padded(home.layout.nbytes)
        return homes
