"""Cross-entropy over the supervised tokens, a chunk of them at a time.

No [tokens, vocab] tensor ever stands: a chunk's logits are made, turned into their own gradient in place, and freed.
Tokens that carry no loss have no logits at all. Where the head does not fit on the device, the vocabulary comes in
chunks too, twice: the softmax must have seen all of it before any logit has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from qlora.model.batch import Batch


class TokenLoss(torch.autograd.Function):
    """Sum over tokens of -log softmax(logits)[target], computed in fp32.

    logits   [N, vocab_size]   any float dtype
    targets  int64 [N]
    returns  fp32 []

    The gradient, softmax(logits) - onehot(targets), takes the place of the fp32 logits in the forward.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        work = logits.to(torch.float32, copy=True)
        at_target = work.gather(1, targets[:, None])[:, 0]
        lse = torch.logsumexp(work, dim=1)
        loss = (lse - at_target).sum()
        if ctx.needs_input_grad[0]:
            work.sub_(lse[:, None]).exp_()
            work.scatter_add_(1, targets[:, None], work.new_full((len(targets), 1), -1.0))
            ctx.save_for_backward(work)
            ctx.dtype = logits.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor):  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(g).to(ctx.dtype), None  # in place: a loss goes backward once


def head_loss(
    epilogue: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    batch: Batch,
    denominator: int,
    chunk: int,
    backward: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A micro-batch's share of the step's loss, and its gradient at the last layer's output.

    epilogue     [N, hidden_size] -> logits [N, vocab_size]
    hidden       [B, T, hidden_size]   as it left the last layer
    denominator  supervised tokens of the whole optimizer step: the loss is their mean
    chunk        tokens whose logits stand at a time
    backward     False: only the loss

    returns the share, fp32 [], and the gradient [B, T, hidden_size]. Parameters of the head that are trained get
    their gradients on the way.
    """
    positions, targets = batch.targets()
    flat = hidden.detach().flatten(0, 1)
    gradient = torch.zeros_like(flat) if backward else None
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for here, expected in zip(positions.split(chunk), targets.split(chunk), strict=True):
        with torch.set_grad_enabled(backward):
            part = flat[here].requires_grad_(backward)
            loss = TokenLoss.apply(epilogue(part), expected) / denominator
        total += loss.detach()
        if gradient is not None:
            loss.backward()
            assert part.grad is not None
            gradient[here] = part.grad
    return total, None if gradient is None else gradient.view_as(hidden)


def streamed_head_loss(
    sweep: Callable[[], Iterable[tuple[slice, Callable[[torch.Tensor], torch.Tensor]]]],
    hidden: torch.Tensor,
    batch: Batch,
    denominator: int,
    chunk: int,
    backward: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`head_loss` with a head that passes by in chunks of columns; the rest as there.

    sweep  () -> each chunk of columns in turn, with its epilogue, [N, hidden_size] -> logits [N, columns]; an epilogue
           is done with before the next is asked for

    Called once for the loss and once more for the gradient, however many chunks of tokens there are.
    """
    positions, targets = batch.targets()
    flat = hidden.detach().flatten(0, 1)
    # Of each token, over the columns seen so far: its largest logit, sum of exp(logit - largest), logit at the target.
    lowest = torch.finfo(torch.float32).min
    largest = torch.full(targets.shape, lowest, dtype=torch.float32, device=hidden.device)
    mass, at_target = torch.zeros_like(largest), torch.zeros_like(largest)

    def tiles(*per_token: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
        return zip(*(tensor.split(chunk) for tensor in (positions, targets, *per_token)), strict=True)

    with torch.no_grad():
        for columns, epilogue in sweep() if len(positions) else ():
            for here, expected, top, below, found in tiles(largest, mass, at_target):
                work = epilogue(flat[here]).to(torch.float32, copy=True)
                place, inside = _within(expected, columns)
                found.copy_(torch.where(inside, work.gather(1, place)[:, 0], found))
                higher = torch.maximum(top, work.amax(dim=1))
                below.mul_((top - higher).exp_()).add_(work.sub_(higher[:, None]).exp_().sum(dim=1))
                top.copy_(higher)
    lse = largest + mass.log()
    total = (lse - at_target).sum() / denominator
    if not backward:
        return total, None
    # A sum over column chunks, in fp32: so its terms are rounded to hidden's dtype, but no partial sum is.
    gradient = torch.zeros(len(positions), *flat.shape[1:], dtype=torch.float32, device=hidden.device)
    for columns, epilogue in sweep() if len(positions) else ():
        for here, expected, normalizer, so_far in tiles(lse, gradient):
            part = flat[here].requires_grad_()
            with torch.enable_grad():
                logits = epilogue(part)
            work = logits.detach().to(torch.float32, copy=True).sub_(normalizer[:, None]).exp_()
            place, inside = _within(expected, columns)
            work.scatter_add_(1, place, -inside[:, None].to(work.dtype)).div_(denominator)
            logits.backward(work.to(logits.dtype))
            assert part.grad is not None
            so_far += part.grad
    whole = torch.zeros_like(flat)
    whole[positions] = gradient.to(flat.dtype)
    return total, whole.view_as(hidden)


def _within(targets: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each target is among `columns`, int64 [N, 1], and whether it is there at all, bool [N]."""
    place = targets - columns.start
    width = columns.stop - columns.start
    return place.clamp(0, width - 1)[:, None], (place >= 0) & (place < width)
