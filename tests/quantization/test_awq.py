from __future__ import annotations

import pytest
import torch

from oracles.awq import best_slow, loss_slow
from pocketsize.quantization.awq import LIMIT, candidates, input_scales, scaled_loss
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme

SCHEME = Scheme(3, 64)


def layer(loud: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix, rows that it reads and rows held out; some inputs are louder than the others."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(600, 128, generator=g)
    X[:, ::50] *= loud
    return torch.randn(40, 128, generator=g) * 0.05, X[:450], X[450:]


def found(
    W: torch.Tensor, X: torch.Tensor, held: torch.Tensor, **options: torch.Tensor
) -> torch.Tensor | None:
    every = {"feeds": torch.arange(128), "most": torch.full((128,), float("inf"))} | options
    return input_scales(W, X.T @ X / len(X), held.T @ held / len(held), SCHEME, **every)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("loud", [1.0, 60.0])
def test_equals_the_search_on_rows_of_text(loud: float, seed: int) -> None:
    W, X, held = layer(loud, seed)
    ours = found(W, X, held)
    theirs = best_slow(W, X, held, SCHEME, torch.arange(128), torch.full((128,), float("inf")), 10)
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        assert loss_slow(W, X, ours, SCHEME) == pytest.approx(loss_slow(W, X, theirs, SCHEME), rel=1e-4)


def test_loud_inputs_are_made_larger_and_the_error_falls() -> None:
    W, X, held = layer(60.0)
    s = found(W, X, held)
    assert s is not None
    assert float(s[::50].mean()) > 2 * float(s.mean())
    assert torch.equal(torch.exp2(torch.log2(s).round()), s) and float(s.max()) <= 2.0**LIMIT
    H = held.T @ held / len(held)
    assert scaled_loss(W, H, s, SCHEME) < 0.7 * scaled_loss(W, H, torch.ones(128), SCHEME)


def test_what_the_held_out_text_does_not_bear_out_is_not_done() -> None:
    W, X, held = layer(60.0)
    quiet = held.clone()
    quiet[:, ::50] *= 0.001  # what was loud where scales were chosen is silent here
    assert found(W, X, held) is not None
    assert found(W, X, quiet) is None


def test_inputs_that_are_one_output_share_a_scale_and_none_exceeds_what_it_can_take() -> None:
    W, X, held = layer(60.0)
    feeds, most = torch.arange(128) % 32, torch.full((32,), 2.0)
    H = X.T @ X / len(X)
    assert all(len(s) == 32 and float(s.max()) <= 2 for s in candidates(W, H, SCHEME, feeds, most, 10))
    s = found(W, X, held, feeds=feeds, most=most)
    assert s is None or len(s) == 32


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(4, 64, True), Scheme(4, 64, float_zeros=True)])
def test_dividing_outputs_by_what_they_can_take_changes_no_bit(scheme: Scheme) -> None:
    W = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    W[3] = 0  # its scale is the smallest: it can take nothing
    q = rtn(W, scheme)
    most = q.most
    assert float(most[3]) == 1 and float(most.min()) >= 1 and float(most.max()) > 1
    small: QWeight = q.divided(most)
    assert torch.equal(small.dequantize() * most[:, None], q.dequantize())
    assert torch.equal(small.scale, small.scale.half().float())
    assert torch.equal(small.minimum * most[:, None], q.minimum)
    assert torch.equal(small.minimum, small.minimum.half().float()) or not scheme.float_zeros
