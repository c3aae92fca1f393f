"""Sparse plus low rank against whole decompositions."""

import pytest
import torch
from tests.oracles.pruning import error, oats_slow
from tests.pruning.problem import problem

from pocketsize.pruning.oats import oats, split
from pocketsize.pruning.pattern import Pattern, pattern_of


@pytest.mark.parametrize("pattern", [Pattern(0.6), pattern_of("2:4", 0.5)], ids=["share", "2:4"])
def test_it_is_the_papers_with_followed_subspaces(pattern):
    W, H = problem(32, 64)
    S, left, right = oats(W, H, pattern, 4)
    slow, L = oats_slow(W, H, pattern, 4)
    assert left.shape == (32, 4) and right.shape == (4, 64)
    assert int((S == 0).sum()) == int((slow == 0).sum())
    assert error(W, S + left @ right, H) <= 1.05 * error(W, slow + L, H)
    exact, product = H.diagonal().sqrt(), left @ right
    ours, theirs = (float(((W - X) * exact).square().sum()) for X in (S + product, slow + L))
    assert ours == pytest.approx(theirs, rel=0.1)


def test_what_is_sparse_and_of_low_rank_is_found():
    """Ten large weights on top of a matrix of rank 2 leave nothing."""
    generator = torch.Generator().manual_seed(0)
    L = torch.randn(40, 2, generator=generator) @ torch.randn(2, 60, generator=generator)
    W = L.clone()
    W[torch.arange(10), torch.arange(10)] += 30
    S, left, right = oats(W, torch.eye(60), Pattern(0.9), 2, scope="matrix", rounds=60)
    assert error(W, S + left @ right, torch.eye(60)) < 1e-3


@pytest.mark.parametrize(("rows", "columns"), [(576, 576), (192, 576), (1536, 576)])
def test_both_parts_hold_what_is_kept(rows, columns):
    rank, sparsity = split(rows, columns, 0.5, 0.25)
    numbers = rank * (rows + columns) + (1 - sparsity) * rows * columns
    assert numbers == pytest.approx(0.5 * rows * columns)
    assert rank * (rows + columns) == pytest.approx(0.125 * rows * columns, rel=0.1)


def test_a_share_of_the_rank_lowers_the_error_where_a_matrix_has_strong_directions():
    W, H = problem(48, 64)
    W = W + 4 * torch.randn(48, 2) @ torch.randn(2, 64)
    rank, sparsity = split(48, 64, 0.6, 0.25)
    S, left, right = oats(W, H, Pattern(sparsity), rank, scope="matrix")
    alone, _, _ = oats(W, H, Pattern(0.6), 1, scope="matrix", rounds=1)
    assert error(W, S + left @ right, H) < error(W, alone, H)
