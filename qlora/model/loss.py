"""Cross-entropy over the supervised tokens, a chunk of them at a time.

No [tokens, vocab] tensor ever stands: a chunk's logits are made, turned into their own gradient in place, and freed.
Tokens that carry no loss have no logits at all.
"""

from __future__ import annotations

from collections.abc import Callable
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
