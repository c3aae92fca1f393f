"""Scales that move outliers of inputs into weights."""

from __future__ import annotations

import pytest
import torch

from oracles.smooth import loss_slow, scales_slow
from pocketsize.quantization.scheme import NAMED
from pocketsize.quantization.smooth import LIMIT, candidates, smooth_scales, smoothed_loss

KINDS = pytest.mark.parametrize("word", ["W8A8", "FP8"])
EVERY = torch.arange(64)
FREE = torch.full((64,), float("inf"))


def layer(loud: float = 50.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix, tokens that it reads and tokens held out; some inputs are louder than the others."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(160, 64, generator=g)
    X[:, ::20] *= loud
    return torch.randn(32, 64, generator=g) * 0.05, X[:100], X[100:]


def found(W: torch.Tensor, X: torch.Tensor, held: torch.Tensor, word: str = "W8A8", **other: torch.Tensor):
    where = {"feeds": EVERY, "most": FREE} | other
    return smooth_scales(W, X, held, X.abs().amax(0), NAMED[word], **where)


@pytest.mark.parametrize("feeds", [EVERY, EVERY % 16], ids=["each its own", "four one"])
def test_candidates_equal_the_papers_formula(feeds: torch.Tensor) -> None:
    W, X, _ = layer()
    peak, fed = X.abs().amax(0), int(feeds.max()) + 1
    for k, s in enumerate(candidates(W, peak, feeds, torch.full((fed,), float("inf")), 10)):
        assert torch.equal(s, scales_slow(W, peak, feeds, fed, k / 10)), k


@KINDS
def test_the_loss_equals_the_loop(word: str) -> None:
    W, X, held = layer()
    s = 2.0 ** (torch.arange(64) % 5 - 2)
    for seen in (None, X):
        ours = smoothed_loss(W, held, s, NAMED[word], seen)
        assert ours == pytest.approx(loss_slow(W, held, s, NAMED[word], seen), rel=1e-4)


def test_the_best_exponent_is_taken() -> None:
    W, X, held = layer()
    tried = [torch.ones(64), *candidates(W, X.abs().amax(0), EVERY, FREE, 10)]
    best = min(tried, key=lambda s: loss_slow(W, X, s, NAMED["W8A8"]))
    assert torch.equal(found(W, X, held), best)


def test_loud_inputs_become_quieter_and_the_error_falls() -> None:
    W, X, held = layer()
    s = found(W, X, held)
    assert float(s[::20].min()) > 2 * float(s.median())
    assert torch.equal(torch.exp2(torch.log2(s).round()), s) and float(s.max()) <= 2.0**LIMIT
    plain, smoothed = (smoothed_loss(W, held, one, NAMED["W8A8"]) for one in (torch.ones(64), s))
    assert smoothed < 0.2 * plain


def test_what_the_held_out_text_does_not_bear_out_is_not_done() -> None:
    W, X, held = layer(loud=6)
    s, one = found(W, X, held), torch.ones(64)
    assert s is not None

    def lost(tokens: torch.Tensor, by: torch.Tensor) -> float:
        return loss_slow(W, tokens, by, NAMED["W8A8"], X)

    worse = torch.stack([x for x in held if lost(x[None], s) > lost(x[None], one)])
    assert 0 < len(worse) < len(held) and lost(held, s) < lost(held, one)
    assert found(W, X, worse) is None


def test_inputs_that_are_one_output_share_a_scale_and_none_exceeds_what_it_can_take() -> None:
    W, X, held = layer()
    most = torch.full((16,), 2.0)
    s = found(W, X, held, feeds=EVERY % 16, most=most)
    assert s is None or (len(s) == 16 and float(s.max()) <= 2)
    assert all(float(c.max()) <= 2 for c in candidates(W, X.abs().amax(0), EVERY % 16, most, 10))


def test_inputs_are_untouched() -> None:
    made = layer()
    before = [one.clone() for one in made]
    found(*made)
    assert all(torch.equal(a, b) for a, b in zip(made, before, strict=True))
