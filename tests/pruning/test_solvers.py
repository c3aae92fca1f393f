"""Scores and solvers against the papers, and against each other."""

import pytest
import torch
from tests.oracles.pruning import (
    alps_slow,
    error,
    highest_slow,
    refit_slow,
    sparsegpt_slow,
    surgeon_slow,
)
from tests.pruning.problem import problem

from pocketsize.errors import NumericalError
from pocketsize.pruning import alps as solver
from pocketsize.pruning.alps import alps
from pocketsize.pruning.mask import highest
from pocketsize.pruning.pattern import Pattern, pattern_of
from pocketsize.pruning.score import fisher, magnitude, surgeon, wanda
from pocketsize.pruning.sparsegpt import sparsegpt
from pocketsize.pruning.support import refit

HALF, TWO_OF_FOUR = Pattern(0.5), pattern_of("2:4", 0.5)
BOTH = pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR], ids=["half", "2:4"])


def test_wanda_is_the_mean_size_of_what_a_weight_adds():
    W, H = problem()
    expected = [[abs(float(W[i, j])) * float(H[j, j]) ** 0.5 for j in range(64)] for i in range(24)]
    torch.testing.assert_close(wanda(W, H), torch.tensor(expected))


def test_surgeon_is_the_error_that_is_left_when_all_others_make_up_for_a_weight():
    W, H = problem(4, 16)
    torch.testing.assert_close(surgeon(W, H).double(), surgeon_slow(W, H), rtol=1e-4, atol=1e-5)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(16)
    without = torch.ones(4, 16, dtype=torch.bool)
    without[2, 5] = False
    X = refit_slow(W, without, damped)
    E = W.double() - X
    assert float((E @ damped.double() * E).sum()) == pytest.approx(float(surgeon(W, H)[2, 5]), rel=1e-4)


def test_taylor_is_the_mean_square_of_what_a_loss_changes_by_to_first_order():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(3, 5, generator=generator, requires_grad=True)
    X = torch.randn(7, 5, generator=generator)
    expected = torch.zeros(3, 5)
    gradients = []
    for x in X:
        out = W @ x
        out.retain_grad()
        loss = out.square().sum() + out[0].sin()
        loss.backward()
        gradients.append(out.grad)
        expected += (W.detach() * W.grad).square() / len(X)
        W.grad = None
    torch.testing.assert_close(fisher(W.detach(), X, torch.stack(gradients)), expected)


@BOTH
def test_refit_is_least_squares_on_what_is_left(pattern):
    W, H = problem()
    H += 0.01 * H.diagonal().mean() * torch.eye(64)
    mask = highest(W.abs(), pattern)
    X = refit(W, mask, H, rounds=200)
    torch.testing.assert_close(X.double(), refit_slow(W, mask, H), rtol=1e-3, atol=1e-3)
    assert not bool(X[~mask].any())


def test_refit_without_a_mask_changes_nothing():
    W, H = problem()
    torch.testing.assert_close(refit(W, torch.ones_like(W, dtype=torch.bool), H), W)


@BOTH
def test_sparsegpt_is_the_papers(pattern):
    W, H = problem(16, 192)
    X = sparsegpt(W, H, pattern)
    expected = sparsegpt_slow(W, H, pattern)
    torch.testing.assert_close(X.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_sweep_with_a_given_mask_is_sparsegpt_where_that_chose_it():
    W, H = problem(16, 192)
    X = sparsegpt(W, H, HALF)
    torch.testing.assert_close(sparsegpt(W, H, HALF, mask=X != 0), X, rtol=1e-3, atol=1e-4)


@BOTH
@pytest.mark.parametrize("rounds", [1, 4, 7, 12])
def test_alps_is_the_papers_with_its_schedule(pattern, rounds, monkeypatch):
    """Three steps of conjugate gradients in the end leave a few percent of what all of them gain."""
    W, H = problem()
    slow = alps_slow(W, H, pattern, rounds=rounds)
    expected = error(W, slow, H)
    assert error(W, alps(W, H, pattern, rounds=rounds), H) == pytest.approx(expected, rel=0.1)
    monkeypatch.setattr(solver, "REFITS", 200)
    X = alps(W, H, pattern, rounds=rounds)
    assert (X != 0).eq(slow != 0).double().mean() > 0.99
    assert error(W, X, H) == pytest.approx(expected, rel=0.005)


@BOTH
def test_sparsegpt_counts_what_is_gone(pattern):
    W, H = problem(16, 192)
    there = torch.rand(16, 192, generator=torch.Generator().manual_seed(0)) > 0.3
    X = sparsegpt(W, H, pattern, there=there)
    torch.testing.assert_close(X.double(), sparsegpt_slow(W, H, pattern, there=there), rtol=1e-3, atol=1e-4)
    assert not bool(X[~there].any())


@BOTH
def test_alps_counts_what_is_gone(pattern, monkeypatch):
    monkeypatch.setattr(solver, "REFITS", 200)
    W, H = problem()
    there = torch.rand(24, 64, generator=torch.Generator().manual_seed(0)) > 0.3
    X, slow = alps(W, H, pattern, there=there), alps_slow(W, H, pattern, there=there)
    assert not bool(X[~there].any())
    assert (X != 0).eq(slow != 0).double().mean() > 0.99
    assert error(W, X, H) == pytest.approx(error(W, slow, H), rel=0.005)
    parts = [alps(W[a:b], H, pattern, there=there[a:b]) for a, b in ((0, 8), (8, 24))]
    whole = alps(W, H, pattern, rows=(8, 16), there=there)
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-3, atol=1e-4)


@BOTH
@pytest.mark.parametrize("solve", [alps, sparsegpt])
def test_what_comes_out_has_the_pattern(solve, pattern):
    W, H = problem(16, 192)
    before = W.clone(), H.clone()
    X = solve(W, H, pattern)
    assert int((X == 0).sum()) == X.numel() // 2
    if pattern.of:
        assert bool(((X == 0).view(-1, 4).sum(1) == 2).all())
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


@pytest.mark.parametrize("share", [0.5, 0.6, 0.7])
def test_the_published_order(share):
    """Magnitude far worse, Wanda about SparseGPT and a little behind it, ALPS ahead of both."""
    pattern, found = Pattern(share), {name: 0.0 for name in ("magnitude", "wanda", "sparsegpt", "alps")}
    for seed in range(3):
        W, H = problem(64, 128, tokens=1000, seed=seed)
        found["magnitude"] += error(W, W * highest(magnitude(W), pattern), H)
        found["wanda"] += error(W, W * highest(wanda(W, H), pattern, "row"), H)
        found["sparsegpt"] += error(W, sparsegpt(W, H, pattern), H)
        found["alps"] += error(W, alps(W, H, pattern), H)
    assert found["alps"] < 0.95 * found["sparsegpt"] < 0.95 * found["wanda"] < 0.5 * found["magnitude"]
    assert found["wanda"] < 1.5 * found["sparsegpt"]


def test_an_input_that_is_always_zero_loses_its_weights_first():
    W, H = problem()
    H[5] = H[:, 5] = 0
    for X in (alps(W, H, HALF), W * highest(wanda(W, H), HALF)):
        assert not bool(X[:, 5].any())
        assert bool(X.isfinite().all())


def test_inputs_that_are_all_zero_are_refused():
    W, H = problem()
    with pytest.raises(NumericalError, match="every input"):
        alps(W, torch.zeros_like(H), HALF)


def test_a_row_of_zeros_stays_one():
    W, H = problem()
    W[3] = 0
    assert not bool(alps(W, H, HALF)[3].any())


def test_the_oracle_of_masks_keeps_what_it_is_asked_for():
    assert int(highest_slow(torch.rand(4, 8), HALF).sum()) == 16
