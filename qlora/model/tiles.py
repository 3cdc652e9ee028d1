"""A decoder layer run a tile of tokens at a time, with no architecture named.

Everything in a layer but its attention treats each token alone. So its own forward runs on a tile up to its attention,
where the queries, keys and values are kept and the run ends; attention sees all tokens; and the forward runs on the
tile once more, its attention answered with the tile's part of the result. The backward goes the same way down. So what
stands for all tokens is the layer's input, queries, keys, values, attention's output and gradients of these; all that
a layer makes besides (norms in fp32, the MLP) stands for one tile.

The price is a second run of what comes before attention, a tenth of a Llama layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from qlora.errors import ModelError
from qlora.model.attention import Answer, Call, driving

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


WHOLE = -1


class CannotTile(ModelError):
    """Why a layer cannot be run in tiles."""


class _Reached(Exception):
    """A layer's forward got to its attention."""

    def __init__(self, call: Call) -> None:
        self.call = call


def token_axes(arguments: Arguments, shorter: Arguments) -> list[int | None]:
    """Which axis of each of a layer's arguments is the tokens': the one that differs between two numbers of tokens.

    WHOLE stands for a tensor that has no such axis, None for what is no tensor. Raises CannotTile where there are two.
    """
    (leaves, structure), (others, other_structure) = tree_flatten(arguments), tree_flatten(shorter)
    if structure != other_structure:
        raise CannotTile("what its layers take depends on the number of tokens")
    return [_axis(a, b) for a, b in zip(leaves, others, strict=True)]


def _axis(a: Any, b: Any) -> int | None:
    if not isinstance(a, torch.Tensor):
        return None
    axes = [axis for axis, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
    if len(axes) > 1:
        raise CannotTile("its layers take a tensor of tokens x tokens")
    return axes[0] if axes else WHOLE


class TiledLayer:
    """One layer on one micro-batch.

    layer      as it is in the model
    arguments  what the model hands to it beside the hidden state
    axes       of `arguments`, from `token_axes`
    attend     attention over all tokens
    tile       tokens of a tile, in each row
    """

    def __init__(
        self, layer: nn.Module, arguments: Arguments, axes: Sequence[int | None], attend: Answer, tile: int
    ) -> None:
        self.layer, self.attend, self.tile, self.axes = layer, attend, tile, axes
        self._leaves, self._structure = tree_flatten(arguments)
        if [isinstance(leaf, torch.Tensor) for leaf in self._leaves] != [axis is not None for axis in axes]:
            raise CannotTile("its layers take other arguments than they did on the probe")
        self._seed = torch.initial_seed()

    def __call__(self, x: torch.Tensor, wanted: bool = True) -> torch.Tensor:
        """[B, T, hidden_size] in, the same shape out.

        wanted  False: only the gradient is; the answer's values are not computed

        The gradient that is given to the answer's backward is overwritten with that of x, which saves one of its size.
        """
        trains = x.requires_grad or any(p.requires_grad for p in self.layer.parameters())
        if torch.is_grad_enabled() and trains:
            # An input that requires a gradient is what makes autograd come back, and x need not be one.
            y = _Tiled.apply(x, torch.empty(0, device=x.device, requires_grad=True), self, wanted)
        else:
            y = self.after(x, self.attention(x))
        self.seed("next")
        return y

    def spans(self, x: torch.Tensor) -> list[slice]:
        """The tiles of x."""
        tokens = x.shape[1]
        return [slice(start, min(start + self.tile, tokens)) for start in range(0, tokens, self.tile)]

    @torch.no_grad()
    def before(self, x: torch.Tensor) -> Call:
        """Run up to attention: queries, keys and values of all tokens."""
        spans = self.spans(x)
        call = self.call_of(x[:, spans[0]], spans[0])
        parts = _states(call)
        # Stored as [B, T, heads, head_dim], as attention's kernels like it and as a tile writes it in one piece.
        whole = [p.new_empty(p.shape[0], x.shape[1], p.shape[1], p.shape[3]).transpose(1, 2) for p in parts]
        for span in spans:
            if span.start:
                call = self.call_of(x[:, span], span)
            for state, part in zip(whole, _states(call), strict=True):
                state[:, :, span] = part
        return call.with_states(*whole)

    def after(self, x: torch.Tensor, outs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Run with attention's answer, which comes as one tensor for each of `heads_of`."""
        y = torch.empty_like(x)
        for span in self.spans(x):
            y[:, span] = self.answer_of(x[:, span], span, torch.cat([out[:, span] for out in outs], 2))
        return y

    def call_of(self, x: torch.Tensor, span: slice) -> Call:
        """What a tile asks of attention."""

        def stop(call: Call) -> torch.Tensor:
            raise _Reached(call)

        try:
            self._run(x, span, stop)
        except _Reached as reached:
            return reached.call
        raise CannotTile("a layer of it never calls attention")

    def answer_of(self, x: torch.Tensor, span: slice, out: torch.Tensor) -> torch.Tensor:
        """What a tile makes of attention's answer."""
        answers = [out]

        def answer(call: Call) -> torch.Tensor:
            if not answers:
                raise CannotTile("a layer of it calls attention more than once")
            return answers.pop()

        return self._run(x, span, answer)

    def attention(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Attention of all tokens, one tensor for each of `heads_of`."""
        return [self.attend(call) for call in heads_of(self.before(x))]

    def _run(self, x: torch.Tensor, span: slice, answer: Answer) -> torch.Tensor:
        self.seed(span.start)
        leaves = [
            leaf if axis is None or axis == WHOLE else leaf.narrow(axis, span.start, span.stop - span.start)
            for leaf, axis in zip(self._leaves, self.axes, strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, self._structure)
        with driving(answer):
            out = self.layer(x, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def seed(self, part: object) -> None:
        """Let a part of the layer's run draw the same dropout masks each time, whatever was drawn before it.

        A tile's are those of its first token: the same before and after attention, up and down.
        """
        if self.layer.training:
            torch.manual_seed(zlib.crc32(f"{self._seed} {part}".encode()))


def heads_of(call: Call) -> list[Call]:
    """The call split into its key heads, each with the query heads that share it; views, not copies.

    Heads do not see each other, so one at a time is the same, and what attention's kernels need besides (its backward
    in flash: an fp32 copy of the queries' gradient, keys and values once for each query head) stands for one.
    """
    groups = zip(*(x.chunk(call.key.shape[1], 1) for x in _states(call)), strict=True)
    return [call.with_states(*group) for group in groups]


class _Tiled(torch.autograd.Function):
    """TiledLayer with a backward. Only attention keeps its graph; the rest is run again, a tile at a time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, tiled: TiledLayer, wanted: bool) -> torch.Tensor:
        ctx.tiled = tiled
        # `.data` has a version of its own: a head's gradients may be written while its neighbours wait for theirs.
        ctx.heads = [
            call.with_states(*(state.data.requires_grad_() for state in _states(call)))
            for call in heads_of(tiled.before(x))
        ]
        with torch.enable_grad():
            ctx.outs = [tiled.attend(call) for call in ctx.heads]
        ctx.save_for_backward(x)
        # Not `outs` themselves: they carry attention's graph.
        return tiled.after(x, [out.detach() for out in ctx.outs]) if wanted else x.new_empty(()).expand_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor):  # type: ignore[override]
        (x,), tiled, heads, outs = ctx.saved_tensors, ctx.tiled, ctx.heads, ctx.outs
        ctx.heads = ctx.outs = None
        needs_x = ctx.needs_input_grad[0]
        g = g.contiguous()
        spans = tiled.spans(x)

        # What follows attention. Its answer's gradient is kept; x's takes the place of the one that came in.
        d_outs: list[Any] = [torch.empty_like(out) for out in outs]
        widths = [out.shape[2] for out in outs]
        for span in spans:
            x_tile = x[:, span].detach().requires_grad_(needs_x)
            out_tile = torch.cat([out.detach()[:, span] for out in outs], 2).requires_grad_()
            with torch.enable_grad():
                y_tile = tiled.answer_of(x_tile, span, out_tile)
            y_tile.backward(g[:, span])
            for d_out, part in zip(d_outs, _gradient(out_tile).split(widths, 2), strict=True):
                d_out[:, span] = part
            if needs_x:
                g[:, span] = _gradient(x_tile)

        # Attention. The gradients of queries, keys and values take their places.
        for i, call in enumerate(heads):
            states = _states(call)
            for state, gradient in zip(states, torch.autograd.grad(outs[i], states, d_outs[i]), strict=True):
                state.copy_(gradient)
            outs[i] = d_outs[i] = None

        # What comes before it.
        for span in spans:
            x_tile = x[:, span].detach().requires_grad_(needs_x)
            with torch.enable_grad():
                states = _states(tiled.call_of(x_tile, span))
            parts = zip(*(_states(call) for call in heads), strict=True)
            gradients = [torch.cat([part[:, :, span] for part in each], 1) for each in parts]
            trained = [pair for pair in zip(states, gradients, strict=True) if pair[0].requires_grad]
            if trained:
                torch.autograd.backward([state for state, _ in trained], [gradient for _, gradient in trained])
            if needs_x:
                g[:, span] += _gradient(x_tile)
        tiled.seed("next")
        return (g.detach() if needs_x else None), None, None, None


def _states(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return call.query, call.key, call.value


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
