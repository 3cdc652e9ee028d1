"""Attention that never builds a mask: causal within each document, from the documents' lengths alone.

transformers asks a registry for its attention and for its masks, and `cut` switches a model to the entry `NAME`. Inside
`driving` it makes no masks and hands each call to whoever drives; outside, as in generation, it is stock `sdpa`. It is
what transformers asks of FlashAttention: causal, `sliding_window`, grouped heads. That is all there is to the attention
of a model that supports FlashAttention; for the rest it raises Unsupported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora.errors import ModelError

NAME = "qlora_sdpa"
QUERY_TILE = 1024  # queries that share a mask under a sliding window: window + 1024 keys each, a quarter more at 4096

Documents = tuple[tuple[int, ...], ...]  # lengths of the documents in each row


class Unsupported(ModelError):
    """What a layer asks of its attention that documents and a window do not describe."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a layer asks of its attention.

    query   [B, heads, T, head_dim]
    key     [B, kv_heads, T, head_dim], value likewise
    window  how many tokens one sees, itself included; None: all before it
    """

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    window: int | None
    scaling: float | None
    dropout: float

    def with_states(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Call:
        """The same call with other queries, keys and values."""
        return replace(self, query=query, key=key, value=value)


Answer = Callable[[Call], torch.Tensor]  # [B, T, heads, head_dim]


@dataclass(slots=True)
class _Driver:
    answer: Answer
    windows: set[int | None]  # that masks were asked for


_driver: ContextVar[_Driver | None] = ContextVar("driver", default=None)


@contextmanager
def driving(answer: Answer) -> Iterator[set[int | None]]:
    """Let `answer` be the attention of every switched model; yields the windows that masks are asked for meanwhile."""
    driver = _Driver(answer, set())
    token = _driver.set(driver)
    try:
        yield driver.windows
    finally:
        _driver.reset(token)


def attend(call: Call, documents: Documents, windows: Collection[int | None]) -> torch.Tensor:
    """Attention of each token to those before it in its own document: [B, T, heads, head_dim].

    documents  lengths of the documents in each row, T together
    windows    what the model asked masks for: a layer that wants another one does not mean what FlashAttention does
    """
    if call.window not in windows:
        raise Unsupported(f"its attention has the window {call.window}, its masks {sorted(map(str, windows))}")
    if any(sum(lengths) != call.query.shape[2] for lengths in documents) or call.key.shape[2] != call.query.shape[2]:
        raise Unsupported("it attends to other tokens than those of the micro-batch")
    if len(set(documents)) == 1:
        return _rows(call, documents[0])
    states = zip(*(x.split(1) for x in (call.query, call.key, call.value)), strict=True)
    return torch.cat([_rows(call.with_states(*row), lengths) for row, lengths in zip(states, documents, strict=True)])


def _rows(call: Call, lengths: tuple[int, ...]) -> torch.Tensor:
    """Rows whose borders are the same; neighbours of one length share a kernel."""
    if len(lengths) == 1:
        return _document(call)
    parts, start = [], 0
    for length, run in groupby(lengths):
        n = len(list(run))
        here = slice(start, start := start + n * length)
        states = (x[:, :, here] for x in (call.query, call.key, call.value))
        folded = (x.unflatten(2, (n, length)).transpose(1, 2).flatten(0, 1) for x in states)
        parts.append(_document(call.with_states(*folded)).unflatten(0, (-1, n)).flatten(1, 2))
    return _in_a_row(parts)


def _document(call: Call) -> torch.Tensor:
    """Rows that are one document each."""
    length, window = call.query.shape[2], call.window
    if window is None or length <= window:
        return _sdpa(call, None)
    parts = []
    for start in range(0, length, QUERY_TILE):
        end, first = min(start + QUERY_TILE, length), max(start - window + 1, 0)
        tile = call.with_states(call.query[:, :, start:end], call.key[:, :, first:end], call.value[:, :, first:end])
        # With a mask, stock attention copies keys and values for each query head, and neighbours share most of theirs:
        # kept for the backward, that is ten times the queries at a window of 4096. To do it again is linear in tokens.
        options: Any = {"use_reentrant": False, "preserve_rng_state": call.dropout > 0}
        parts.append(checkpoint(_banded, tile, start - first, window, **options))
    return _in_a_row(parts)


def _banded(call: Call, offset: int, window: int) -> torch.Tensor:
    """Queries that begin `offset` keys after the first key."""
    queries, keys = (torch.arange(x.shape[2], device=x.device) for x in (call.query, call.key))
    distance = (queries + offset)[:, None] - keys
    return _sdpa(call, ((distance >= 0) & (distance < window))[None, None])


def _in_a_row(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _sdpa(call: Call, mask: torch.Tensor | None) -> torch.Tensor:
    out, _ = sdpa_attention_forward(
        call.module, call.query, call.key, call.value, mask, call.dropout, call.scaling, is_causal=True
    )
    return out


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    driver = _driver.get()
    if driver is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    unlike = [name for name in ("softcap", "s_aux", "position_bias", "cache") if kwargs.get(name) is not None]
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        unlike.append("is_causal=False")
    if attention_mask is not None:
        unlike.append("a mask of its own")
    if unlike:
        raise Unsupported(f"its attention takes {', '.join(unlike)}")
    return driver.answer(Call(module, query, key, value, kwargs.get("sliding_window"), scaling, dropout)), None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    driver = _driver.get()
    if driver is None:
        return sdpa_mask(*args, **kwargs)
    driver.windows.add(kwargs.get("local_size"))
    return None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
