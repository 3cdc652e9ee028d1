"""The training step: every gradient of one optimizer step, and the only place where they are computed.

Layer-major. The base is frozen, so inside one optimizer step its layers never change, and the two loops of gradient
accumulation can be swapped: each layer is made ready once on the way up and once on the way down, and all micro-batches
pass through it. Between layers a micro-batch is one boundary activation; inside a layer it is recomputed. The last
layer goes from its forward straight into its backward.

    for i in layers but the last:  ready(i); for j in micro-batches: h[j, i+1] = layer_i(h[j, i])
    ready(last);                             for j in micro-batches: forward, head and loss, backward
    for i in the others, down:     ready(i); for j in micro-batches: layer_i(h[j, i]) again, backward

Each parameter's gradient sums over micro-batches in their order, as it does in the standard order, so both orders give
the same bits. The standard order remains for a model that cannot be cut.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora.config import MemoryConfig
from qlora.errors import ModelError
from qlora.model.batch import Batch, join
from qlora.model.blocks import Blocks, CannotCut, cut, inputs_of
from qlora.model.loss import TokenLoss, head_loss
from qlora.model.residency import Residency, Resident


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


class LayerMajor:
    """The step on a model that can be cut."""

    order = "layer-major"

    def __init__(
        self, blocks: Blocks, residency: Residency, loss_chunk: int, seed: int = 0, joined_tokens: int = 0
    ) -> None:
        """
        loss_chunk     tokens whose logits stand at a time
        seed           of dropout
        joined_tokens  neighbouring micro-batches are computed as one up to so many tokens; 0: each alone
        """
        self.blocks, self.residency, self.loss_chunk, self.seed = blocks, residency, loss_chunk, seed
        self.joined_tokens = joined_tokens
        inside = {id(p) for p in blocks.layers.parameters()}
        self._outside_trains = any(p.requires_grad for p in blocks.model.parameters() if id(p) not in inside)

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
        batches = join(batches, self.joined_tokens)
        supervised = sum(batch.supervised for batch in batches)
        with _reproducible(blocks.model.device):
            with torch.set_grad_enabled(self._outside_trains):
                entries = [blocks.prologue(batch) for batch in batches]
            # acts[j]: the boundary activations of micro-batch j, the newest last
            acts = [[entry.hidden.detach()] for entry in entries]
            with torch.no_grad():
                for i in range(last):
                    with self.residency.visit(i):
                        for j, entry in enumerate(entries):
                            self._seed(step, i, j)
                            acts[j].append(blocks.layer(i, acts[j][-1], entry))
            losses, grads = [], []
            for i in range(last, -1, -1):
                with self.residency.visit(i):
                    for j, entry in enumerate(entries):
                        x = acts[j].pop().requires_grad_(i > 0 or entry.hidden.requires_grad)
                        self._seed(step, i, j)
                        with torch.enable_grad():
                            y = blocks.layer(i, x, entry)
                        if i == last:
                            loss, grad = head_loss(
                                blocks.epilogue, y, batches[j], supervised, self.loss_chunk, backward=True
                            )
                            losses.append(loss)
                            grads.append(grad)
                        if y.requires_grad:
                            y.backward(grads[j])
                        grads[j] = x.grad
            for entry, grad in zip(entries, grads, strict=True):
                if entry.hidden.requires_grad:
                    entry.hidden.backward(grad)
        return _result(losses, batches, supervised)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> StepResult:
        """The same loss with no gradients: each layer is visited once for all of `batches`."""
        blocks = self.blocks
        supervised = sum(batch.supervised for batch in batches)
        entries = [blocks.prologue(batch) for batch in batches]
        hidden = [entry.hidden for entry in entries]
        for i in range(len(blocks)):
            with self.residency.visit(i):
                hidden = [blocks.layer(i, x, entry) for x, entry in zip(hidden, entries, strict=True)]
        losses = [
            head_loss(blocks.epilogue, x, batch, supervised, self.loss_chunk, backward=False)[0]
            for x, batch in zip(hidden, batches, strict=True)
        ]
        return _result(losses, batches, supervised)

    def _seed(self, step: int, layer: int, micro_batch: int) -> None:
        # The recompute must draw the dropout masks of the first pass. torch's CPU generator takes 32 bits of seed.
        torch.manual_seed(zlib.crc32(f"{self.seed} {step} {layer} {micro_batch}".encode()))


class MicroBatchMajor:
    """The step on a model that cannot be cut: its whole forward and backward for each micro-batch, checkpointed."""

    order = "standard"
    isolates_documents = False  # not known, so not believed

    def __init__(self, model: PreTrainedModel, loss_chunk: int, seed: int = 0) -> None:
        self.model, self.loss_chunk, self.seed = model, loss_chunk, seed
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def __call__(self, batches: Sequence[Batch], step: int = 0) -> StepResult:
        """As LayerMajor's."""
        supervised = sum(batch.supervised for batch in batches)
        losses = []
        with _reproducible(self.model.device):
            for j, batch in enumerate(batches):
                torch.manual_seed(zlib.crc32(f"{self.seed} {step} {j}".encode()))
                loss = self._loss(batch, supervised)
                loss.backward()
                losses.append(loss.detach())
        return _result(losses, batches, supervised)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> StepResult:
        """As LayerMajor's."""
        supervised = sum(batch.supervised for batch in batches)
        return _result([self._loss(batch, supervised) for batch in batches], batches, supervised)

    def _loss(self, batch: Batch, supervised: int) -> torch.Tensor:
        positions, targets = batch.targets()
        logits = self.model(**inputs_of(self.model, batch)).logits.flatten(0, 1)
        chunks = zip(positions.split(self.loss_chunk), targets.split(self.loss_chunk), strict=True)
        losses = [TokenLoss.apply(logits[here], expected) for here, expected in chunks]
        return torch.stack(losses).sum() / supervised


Step = LayerMajor | MicroBatchMajor


def choose(
    model: PreTrainedModel, memory: MemoryConfig, seed: int, say: Callable[[str], None]
) -> tuple[Step, Residency]:
    """The step for a model, and where its layers live.

    memory  the recipe's section: its `order` is "layer-major", "standard", or "auto", layer-major where it can be had
    seed    of dropout
    say     is told in a line where "auto" comes down on "standard"

    Raises ModelError where "layer-major" is asked for and cannot be had.
    """
    if memory.order != "standard":
        try:
            blocks = cut(model)
            residency = Resident(blocks.layers)
            step = LayerMajor(blocks, residency, memory.loss_chunk_tokens, seed, memory.micro_batch_tokens)
            return step, residency
        except CannotCut as reason:
            if memory.order == "layer-major":
                raise ModelError(
                    f"memory.order: layer-major, but {type(model).__name__} cannot be cut: {reason}"
                ) from None
            say(f"{type(model).__name__} trains in the standard order: {reason}")
    return MicroBatchMajor(model, memory.loss_chunk_tokens, seed), Resident(nn.ModuleList([model]))


def _result(losses: list[torch.Tensor], batches: Sequence[Batch], supervised: int) -> StepResult:
    shares = tuple(torch.stack(losses).tolist())
    rows = tuple(batch.rows for batch in batches)
    return StepResult(sum(shares), shares, rows, sum(batch.tokens for batch in batches), supervised)


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Seed freely inside; the generators outside are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
