"""Cross-entropy in chunks of tokens, and of columns, against torch's own in fp32."""

import pytest
import torch
import torch.nn.functional as F

from qlora.model.loss import head_loss, streamed_head_loss
from tests.conftest import random_batch

VOCAB, WIDTH = 301, 24


def a_head(dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(3)
    return (torch.randn(VOCAB, WIDTH, generator=g) * scale).to(dtype)


def a_hidden(batch, dtype=torch.float32):
    g = torch.Generator().manual_seed(4)
    return torch.randn(*batch.input_ids.shape, WIDTH, generator=g).to(dtype)


def whole(weight):
    return lambda x: 30 * torch.tanh(F.linear(x, weight) / 30)  # with a soft cap, as some models have


def by_columns(weight, width):
    def sweep():
        for start in range(0, VOCAB, width):
            yield slice(start, min(start + width, VOCAB)), whole(weight[start : start + width])

    return sweep


def truth(weight, hidden, batch, denominator):
    """torch's cross_entropy on all logits at once, in fp32."""
    hidden = hidden.detach().clone().float().requires_grad_()
    logits = whole(weight.float())(hidden)[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum") / denominator
    loss.backward()
    return loss.detach(), hidden.grad


def each_way(weight, hidden, batch, denominator, chunk):
    yield head_loss(whole(weight), hidden, batch, denominator, chunk, backward=True)
    for width in (7, 64, 300, 301, 999):
        yield streamed_head_loss(by_columns(weight, width), hidden, batch, denominator, chunk, backward=True)


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["soft", "saturated"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_loss_and_gradient_are_cross_entropys(chunk, scale):
    batch, weight = random_batch(3, 21, vocab=VOCAB), a_head(scale=scale)
    hidden = a_hidden(batch)
    expected_loss, expected = truth(weight, hidden, batch, 17)
    for loss, gradient in each_way(weight, hidden, batch, 17, chunk):
        # Sums of 301 terms in other orders, and exp(logit - lse) carries the rounding of an lse of some 20: 1e-6.
        assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-6)
        assert torch.allclose(gradient, expected, atol=3e-6 * expected.abs().max(), rtol=0)


def test_in_bf16_columns_in_chunks_are_no_further_from_fp32_than_all_at_once():
    batch, weight = random_batch(8, 64, vocab=VOCAB), a_head(torch.bfloat16, 0.3)
    hidden = a_hidden(batch, torch.bfloat16)
    expected_loss, expected = truth(weight, hidden, batch, 300)
    (loss, gradient), *others = each_way(weight, hidden, batch, 300, 100)
    error = (gradient.float() - expected).pow(2).mean().sqrt()
    for chunked_loss, chunked in others[1:]:
        assert chunked.dtype == torch.bfloat16
        # The logits are the same up to the summation in a product's accumulator, so a stray bf16 rounding among many.
        assert chunked_loss.item() == pytest.approx(loss.item(), rel=1e-4)
        assert abs(chunked_loss - expected_loss) < abs(loss - expected_loss) + 1e-4 * expected_loss
        # Each chunk's term is rounded once; terms of 64 columns are smaller than the whole, and so are their roundings.
        assert (chunked.float() - expected).pow(2).mean().sqrt() < 1.5 * error


@pytest.mark.parametrize("supervised", [0, 1])
def test_no_token_or_one(supervised):
    batch, weight = random_batch(1, 9, vocab=VOCAB), a_head()
    batch.labels[:, : -1 if supervised else None] = -100
    hidden = a_hidden(batch)
    assert batch.supervised == supervised
    for loss, gradient in each_way(weight, hidden, batch, 5, 4):
        assert gradient.shape == hidden.shape
        if supervised:
            expected_loss, expected = truth(weight, hidden, batch, 5)
            assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-6)
            assert torch.allclose(gradient, expected, atol=3e-6 * expected.abs().max(), rtol=0)
        else:
            assert loss == 0 and not gradient.any()


def test_without_a_supervised_token_the_head_stays_where_it_is():
    batch = random_batch(1, 9, vocab=VOCAB)
    batch.labels.fill_(-100)

    def sweep():
        raise AssertionError("asked for")

    loss, gradient = streamed_head_loss(sweep, a_hidden(batch), batch, 5, 4, backward=True)
    assert loss == 0 and gradient is not None and not gradient.any()


def test_a_logit_that_is_not_finite_is_not_hidden():
    batch, weight = random_batch(1, 9, vocab=VOCAB), a_head()
    weight[200, 0] = torch.nan
    for loss, _ in each_way(weight, a_hidden(batch), batch, 5, 4):
        assert not torch.isfinite(loss)
