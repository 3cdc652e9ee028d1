"""The training step: every gradient of one optimizer step, and the only place where they are computed.

Layer-major. The base is frozen, so inside one optimizer step its layers never change, and the two loops of gradient
accumulation can be swapped: each layer is made ready once on the way up and once on the way down, and all micro-batches
pass through it. Between layers a micro-batch is one boundary activation; inside a layer it is recomputed. The last
layer goes from its forward straight into its backward.

    for i in layers but the last:  ready(i); for j in micro-batches: h[j, i+1] = layer_i(h[j, i])
    ready(last);                             for j in micro-batches: forward, head and loss, backward
    for i in the others, down:     ready(i); for j in micro-batches: layer_i(h[j, i]) again, backward

Where memory allows, the layers below the last may keep what is inside them, the last ones first, as these wait for the
shortest time: `memory.layers_kept`. To the store of boundary activations they and the last one are as one layer.

Each parameter's gradient sums over micro-batches in their order, as it does in the standard order, so both orders give
the same bits. The standard order remains for a model that cannot be cut.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qlora.config import MemoryConfig
from qlora.errors import ModelError
from qlora.model.batch import Batch, divisible, halved, regroup
from qlora.model.blocks import Blocks, CannotCut, Entry, cut, inputs_of
from qlora.model.ends import CannotStayOnHost, HeadOnHost, ends_to_host
from qlora.model.kept import without_weights
from qlora.model.loss import TokenLoss, head_loss, streamed_head_loss
from qlora.model.residency import Residency
from qlora.train.activations import Activations, OnDevice, OnFile, OnHost
from qlora.train.masters import Masters


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step saw.

    loss        mean over the supervised tokens of all micro-batches
    losses      the share of it of each micro-batch, as it was computed
    rows        where each of those comes from
    tokens      of documents, padding aside
    supervised  carried loss
    """

    loss: float
    losses: tuple[float, ...]
    rows: tuple[tuple[str, ...], ...]
    tokens: int
    supervised: int


class Halvings:
    """Micro-batches halved as often as it took to fit: half the tokens at a time, twice the count, the same sum."""

    def __init__(self) -> None:
        self._times = 0
        self._left = False  # whether the last batches could be halved once more

    def __call__(self, batches: Sequence[Batch]) -> list[Batch]:
        batches = list(batches)
        for _ in range(self._times):
            batches = halved(batches)
        self._left = divisible(batches)
        return batches

    def more(self) -> str | None:
        """Halve once more from here on; returns what changed, or None where each micro-batch is one document."""
        if not self._left:
            return None
        self._times += 1
        self._left = False  # until it was tried
        return f"micro-batches of 1/{2**self._times} the size, {2**self._times} times as many"


class LayerMajor:
    """The step on a model that can be cut."""

    order = "layer-major"

    def __init__(
        self,
        blocks: Blocks,
        residency: Residency,
        memory: MemoryConfig,
        seed: int = 0,
        directory: str | Path = ".",
    ) -> None:
        """
        memory     where things live meanwhile, and in which pieces they are computed: the recipe's section
        seed       of dropout
        directory  for the file of activations, where memory.activations has one and memory.activations_dir none

        Raises ModelError where the model has not what `memory` asks for.
        """
        self.blocks, self.residency, self.seed = blocks, residency, seed
        self.device = residency.device
        self.loss_chunk, self.most_tokens = memory.loss_chunk_tokens, memory.micro_batch_tokens
        self.layers_kept = min(memory.layers_kept, len(blocks) - 1)  # the last one is as good as kept
        self._halvings = Halvings()
        store: Callable[[bool], Activations] = {
            "device": OnDevice,
            "host": lambda passing: OnHost(self.device, passing),
            "file": lambda passing: OnFile(self.device, memory.activations_dir or directory, passing),
        }[memory.activations]
        self.activations, self.gradients = store(False), store(True)  # of each layer's input, of its output
        inside = {id(p) for p in blocks.layers.parameters()}
        self._outside_trains = any(p.requires_grad for p in blocks.model.parameters() if id(p) not in inside)
        self._masters = Masters(blocks.layers, self.device) if memory.adapters == "host" else None
        self._head: HeadOnHost | None = None
        try:
            blocks.tile_tokens = memory.layer_tile_tokens
            if memory.embeddings == "host":
                self._head = ends_to_host(blocks, self.device, memory.vocabulary_chunk)
        except (CannotCut, CannotStayOnHost) as reason:
            raise ModelError(f"{type(blocks.model).__name__} has not what `memory` asks for: {reason}") from None

    @property
    def isolates_documents(self) -> bool:
        """Whether packed documents do not see each other."""
        return self.blocks.isolates_documents

    def __call__(self, batches: Sequence[Batch], step: int = 0) -> StepResult:
        """Add the gradients of the mean loss over `batches` to every trained parameter's `.grad`.

        batches  the step's micro-batches, on the model's device
        step     number of the optimizer step; with the seed it fixes every dropout mask
        """
        blocks, last = self.blocks, len(self.blocks) - 1
        first = last - self.layers_kept  # from here on up nothing is computed again
        batches = self._halvings(regroup(batches, self.most_tokens))
        supervised = sum(batch.supervised for batch in batches)
        route = self._route([*range(last), *range(last, -1, -1)])
        kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # layer, micro-batch -> its input, output
        with _reproducible(self.device), self.activations as acts, self.gradients as slopes:
            entries = self._enter(batches, acts, slopes, first)

            def received(i: int, j: int) -> torch.Tensor:
                x = acts.take(i, j) if i <= first else kept[i - 1, j][1].detach()
                if first == i < last:
                    x = x.clone()  # what is taken holds until the next take, and this is to hold for longer
                return x.requires_grad_(i > 0 or entries[j].hidden.requires_grad)

            with torch.no_grad():
                for i in range(last):
                    with next(route):
                        for j, entry in enumerate(entries):
                            self._seed(step, i, j)
                            if i < first:
                                acts.put(i + 1, j, blocks.layer(i, acts.take(i, j), entry))
                            else:
                                kept[i, j] = self._keep(i, received(i, j), entry)
            losses = []
            for i in range(last, -1, -1):
                below = last - i  # how far down
                with next(route):
                    for j, entry in enumerate(entries):
                        if (i, j) in kept:
                            x, y = kept.pop((i, j))
                        else:
                            x = received(i, j)
                            self._seed(step, i, j)
                            with torch.enable_grad():
                                y = blocks.layer(i, x, entry, wanted=i == last)
                        if i == last:
                            loss, slope = self._loss(y, batches[j], supervised, backward=True)
                            losses.append(loss)
                        else:
                            slope = slopes.take(below - 1, j)
                        if y.requires_grad:
                            y.backward(slope)
                        if x.grad is not None:
                            slopes.put(below, j, x.grad)
                        del x, y, slope  # or they would stand beside the next ones
            for j, entry in enumerate(entries):
                if entry.hidden.requires_grad:
                    entry.hidden.backward(slopes.take(last, j))
        return _result(losses, batches, supervised)

    def _keep(self, i: int, x: torch.Tensor, entry: Entry) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer i's input and output, with the graph between them that lasts until the way down."""
        with torch.enable_grad(), without_weights(self.blocks.layers[i]):
            return x, self.blocks.layer(i, x, entry)

    def _enter(self, batches: Sequence[Batch], acts: Activations, slopes: Activations, first: int) -> list[Entry]:
        """Run what comes before layer 0, one micro-batch at a time, and begin with what it gives.

        first  the highest layer whose input waits in `acts`
        """
        entries: list[Entry] = []
        for j, batch in enumerate(batches):
            with torch.set_grad_enabled(self._outside_trains):
                entry = self.blocks.prologue(batch)
            hidden = entry.hidden
            if j == 0:
                shapes = [(*each.input_ids.shape, hidden.shape[-1]) for each in batches]
                like = [torch.empty(shape, dtype=hidden.dtype, device="meta") for shape in shapes]
                acts.begin(like, first + 1)
                slopes.begin(like, len(self.blocks) - 1 + hidden.requires_grad)
            acts.put(0, j, hidden)
            entries.append(entry if hidden.requires_grad else entry.without_hidden())
        return entries

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> StepResult:
        """The same loss with no gradients: each layer is visited once for all of `batches`."""
        blocks = self.blocks
        batches = self._halvings(regroup(batches, self.most_tokens))
        supervised = sum(batch.supervised for batch in batches)
        entries = [blocks.prologue(batch) for batch in batches]
        hidden = [entry.hidden for entry in entries]
        for i, visit in enumerate(self._route(range(len(blocks)))):
            with visit:
                hidden = [blocks.layer(i, x, entry) for x, entry in zip(hidden, entries, strict=True)]
        losses = [self._loss(x, batch, supervised, False)[0] for x, batch in zip(hidden, batches, strict=True)]
        return _result(losses, batches, supervised)

    def relieve(self) -> str | None:
        """Hold less on the device from here on, at the price of speed: results stay the same, at first to the bit, and
        where micro-batches are halved up to the order of sums.

        returns what changed, or None where nothing is left to change. Raises HostMemoryError.
        """
        if self.layers_kept:
            self.layers_kept //= 2
            return f"memory.layers_kept: {self.layers_kept}"
        if isinstance(self.activations, OnDevice):
            self.activations, self.gradients = OnHost(self.device), OnHost(self.device, passing=True)
            return "memory.activations: host"
        if moved := self.residency.evict(-(-self.residency.tiers["device"] // 4)):
            return f"memory.layers_on_device: {self.residency.tiers['device']} ({moved} fewer)"
        return self._halvings.more()

    @contextmanager
    def whole_model(self, room: float) -> Iterator[None]:
        """The model's own forward works while the context lasts: for generation.

        room  bytes that may be taken for dense weights
        """
        with ExitStack() as stack:
            stack.enter_context(self.residency.whole_model(room))
            if self._head is not None:
                stack.enter_context(self._head.whole())
            if self._masters is not None:  # all of them at once, as there is no optimizer state at work meanwhile
                for i in range(len(self.blocks)):
                    stack.enter_context(self._masters.visit(i))
            yield

    def _route(self, order: Sequence[int]) -> Iterator[AbstractContextManager[None]]:
        """A visit of each layer in `order`: it is dense, and its trained weights are on the device."""
        for i, visit in zip(order, self.residency.route(order), strict=True):
            yield visit if self._masters is None else _both(visit, self._masters.visit(i))

    def _loss(
        self, hidden: torch.Tensor, batch: Batch, supervised: int, backward: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._head is None:
            return head_loss(self.blocks.epilogue, hidden, batch, supervised, self.loss_chunk, backward)
        chunk = self._head.tokens_at_once(self.loss_chunk)
        return streamed_head_loss(self._head.sweep, hidden, batch, supervised, chunk, backward)

    def _seed(self, step: int, layer: int, micro_batch: int) -> None:
        # The recompute must draw the dropout masks of the first pass. torch's CPU generator takes 32 bits of seed.
        torch.manual_seed(zlib.crc32(f"{self.seed} {step} {layer} {micro_batch}".encode()))


class MicroBatchMajor:
    """The step on a model that cannot be cut: its whole forward and backward for each micro-batch, checkpointed."""

    order = "standard"
    isolates_documents = False  # not known, so not believed

    def __init__(self, model: PreTrainedModel, residency: Residency, loss_chunk: int, seed: int = 0) -> None:
        """residency: of the model as one layer."""
        self.model, self.residency, self.loss_chunk, self.seed = model, residency, loss_chunk, seed
        self.device = residency.device
        self._halvings = Halvings()
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def __call__(self, batches: Sequence[Batch], step: int = 0) -> StepResult:
        """As LayerMajor's."""
        batches = self._halvings(batches)
        supervised = sum(batch.supervised for batch in batches)
        losses = []
        with _reproducible(self.device):
            for j, batch in enumerate(batches):
                torch.manual_seed(zlib.crc32(f"{self.seed} {step} {j}".encode()))
                loss = self._loss(batch, supervised)
                loss.backward()
                losses.append(loss.detach())
        return _result(losses, batches, supervised)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> StepResult:
        """As LayerMajor's."""
        batches = self._halvings(batches)
        supervised = sum(batch.supervised for batch in batches)
        return _result([self._loss(batch, supervised) for batch in batches], batches, supervised)

    def relieve(self) -> str | None:
        """As LayerMajor's: here nothing can be moved, only micro-batches be halved."""
        return self._halvings.more()

    @contextmanager
    def whole_model(self, room: float) -> Iterator[None]:
        """As LayerMajor's."""
        with self.residency.whole_model(room) if self.residency.dense_nbytes <= room else nullcontext():
            yield

    def _loss(self, batch: Batch, supervised: int) -> torch.Tensor:
        positions, targets = batch.targets()
        logits = self.model(**inputs_of(self.model, batch)).logits.flatten(0, 1)
        chunks = zip(positions.split(self.loss_chunk), targets.split(self.loss_chunk), strict=True)
        losses = [TokenLoss.apply(logits[here], expected) for here, expected in chunks]
        return torch.stack(losses).sum() / supervised


Step = LayerMajor | MicroBatchMajor


def choose(
    model: PreTrainedModel,
    device: torch.device,
    memory: MemoryConfig,
    seed: int,
    directory: str | Path,
    say: Callable[[str], None],
) -> Step:
    """The step for a model, with everything where `memory` wants it.

    device     where the model computes
    memory     the recipe's section: its `order` is "layer-major", "standard", or "auto", layer-major where it can be
    seed       of dropout
    directory  for a file of activations
    say        is told in a line where "auto" comes down on "standard"

    Raises ModelError where what is asked for needs layers that run one at a time, and the model has none.
    """
    if memory.order != "standard":
        try:
            blocks = cut(model)
        except CannotCut as reason:
            apart = [key for key, usual in _NEEDS_LAYERS.items() if getattr(memory, key) != usual]
            asked = ["order"] * (memory.order == "layer-major") + apart
            if asked:
                keys = ", ".join(f"memory.{key}: {getattr(memory, key)}" for key in asked)
                raise ModelError(f"{keys}: but {type(model).__name__} cannot be cut: {reason}") from None
            say(f"{type(model).__name__} trains in the standard order: {reason}")
        else:
            return LayerMajor(blocks, Residency(blocks.layers, device), memory, seed, directory)
    return MicroBatchMajor(model, Residency([model], device), memory.loss_chunk_tokens, seed)


# What only layers that run one at a time can give, and what a model has without.
_NEEDS_LAYERS = {
    "layers_on_device": None,
    "activations": "device",
    "adapters": "device",
    "embeddings": "device",
    "layer_tile_tokens": None,
    "layers_kept": 0,
}


def _result(losses: list[torch.Tensor], batches: Sequence[Batch], supervised: int) -> StepResult:
    shares = tuple(torch.stack(losses).tolist())
    rows = tuple(batch.rows for batch in batches)
    return StepResult(sum(shares), shares, rows, sum(batch.tokens for batch in batches), supervised)


@contextmanager
def _both(outer: AbstractContextManager[None], inner: AbstractContextManager[None]) -> Iterator[None]:
    with outer, inner:
        yield


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Seed freely inside; the generators outside are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
