"""Linears solved anew: equal to a plain least squares, and never worse on text that is held out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oracles.heal import healed_slow
from pocketsize.pruning.heal import Residuals, correction, healed


def drawn(seed: int, tokens: int = 400, outs: int = 6, ins: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs, a matrix, and a weight for each token."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, 5, generator=g) @ torch.randn(5, ins, generator=torch.Generator().manual_seed(9))
    X += 0.3 * torch.randn(tokens, ins, generator=g)
    W = torch.randn(outs, ins, generator=torch.Generator().manual_seed(8))
    return X, W, torch.rand(tokens, generator=g) + 0.1


def summed(X: Tensor, R: Tensor, weight: Tensor | None = None, parts: int = 1) -> Residuals:
    found = Residuals.zeros(R.shape[1], X.shape[1])
    weights = [None] * parts if weight is None else weight.chunk(parts)
    for x, r, w in zip(X.chunk(parts), R.chunk(parts), weights, strict=True):
        found.update(x, r, w)
    return found


@pytest.mark.parametrize("damp", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("parts", [1, 3])
def test_equals_a_plain_least_squares(damp: float, parts: int) -> None:
    X, W, weight = drawn(0)
    kept = [0, 2, 3, 7, 9]
    Y = X @ W.T
    S = W[:, kept]
    D = correction(summed(X[:, kept], Y - X[:, kept] @ S.T, weight, parts), damp)
    wanted = healed_slow(S, X[:, kept], Y, weight, damp)
    torch.testing.assert_close((S + D).double(), wanted, rtol=1e-3, atol=1e-4)


def test_undamped_it_is_the_textbook_formula() -> None:
    """W H[:, S] H[S, S]^-1."""
    X, W, _ = drawn(1)
    kept = [1, 4, 5, 6, 8]
    H = (X.T @ X).double()
    wanted = W.double() @ H[:, kept] @ H[kept][:, kept].inverse()
    D = correction(summed(X[:, kept], X @ W.T - X[:, kept] @ W[:, kept].T), 1e-9)
    torch.testing.assert_close((W[:, kept] + D).double(), wanted, rtol=1e-3, atol=1e-3)


def test_held_out_error_falls() -> None:
    kept = [0, 1, 2, 3, 4, 5]
    teach, judge = (
        summed(X[:, kept], X @ W.T - X[:, kept] @ W[:, kept].T) for X, W, _ in (drawn(2), drawn(3))
    )
    done = healed(teach, judge)
    X, W, _ = drawn(4)
    R = X @ W.T - X[:, kept] @ W[:, kept].T
    assert done.damp and done.share < 0.7
    assert (R - X[:, kept] @ done.change.T).square().sum() < 0.7 * R.square().sum()
    assert judge.left(done.change) < judge.left(torch.zeros_like(done.change))


def test_nothing_changes_where_nothing_is_lacking() -> None:
    X, W, _ = drawn(5)
    sums = summed(X, torch.zeros(len(X), len(W)))
    done = healed(sums, sums)
    assert done.damp == 0 and done.share == 1 and not done.change.any()
    assert not correction(sums, 1e-3).any()


def test_noise_is_not_learned() -> None:
    """What a linear lacks that has nothing to do with what it reads is left alone, or nearly."""
    g = torch.Generator().manual_seed(6)
    X, R = torch.randn(30, 20, generator=g), torch.randn(30, 4, generator=g)
    other = torch.randn(30, 20, generator=g), torch.randn(30, 4, generator=g)
    done = healed(summed(X, R), summed(*other))
    assert done.damp in (0, 1.0, 10.0)


def test_dead_inputs_and_no_tokens_give_no_change() -> None:
    X = torch.zeros(10, 3)
    sums = summed(X, torch.ones(10, 2))
    assert not healed(sums, sums).change.any()
    assert not healed(Residuals.zeros(2, 3), Residuals.zeros(2, 3)).change.any()


def test_what_is_left_is_the_error_itself() -> None:
    X, _, weight = drawn(7)
    R = X @ torch.randn(4, 12, generator=torch.Generator().manual_seed(1)).T
    D = torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    plain = (weight[:, None] * (R - X @ D.T) ** 2).sum()
    assert summed(X, R, weight).left(D) == pytest.approx(float(plain), rel=1e-4)
