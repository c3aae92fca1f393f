"""OATS: a matrix as the sum of a sparse one and one of low rank."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pocketsize.errors import NumericalError
from pocketsize.pruning.mask import Scope, highest
from pocketsize.pruning.pattern import Pattern
from pocketsize.pruning.support import refit

ROUNDS = 20
# Columns beyond the rank that its subspace is followed with.
BEYOND = 8


def oats(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    pattern: Pattern,
    rank: int,
    *,
    scope: Scope = "row",
    damp: float = 0.01,
    rounds: int = ROUNDS,
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """A sparse matrix S, and two whose product is L, with S + L near W.

        minimise over S in the pattern and L of the rank:   || (W - S - L) D ||^2,    D^2 = diag E[x x^T]

    In turns L is the best of its rank for W - S, and S what is largest of W - L (OATS, arXiv:2409.13652,
    algorithm 1). Instead of a new singular value decomposition in every round, the subspace of the one before
    is followed by a step of power iteration, and the last round is exact. What S has is then `refit` to what
    the matrix reads, which the paper does not do. W and H are left untouched.
    """
    power = H.diagonal().clamp(min=0).to(torch.float32)
    if not bool((power > 0).any()):
        raise NumericalError("every input of this matrix was zero: nothing tells which weights matter")
    root = power.add(1e-10 * power.max()).sqrt()
    wanted = W.to(torch.float32) * root
    S = wanted * highest(wanted.abs(), pattern, scope)
    width = min(rank + BEYOND, *wanted.shape)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(wanted.shape[1], width, generator=generator).to(wanted.device)
    for _ in range(rounds):
        rest = wanted - S
        basis = torch.linalg.qr(rest.T @ torch.linalg.qr(rest @ basis).Q).Q
        left, right = _best(rest, basis, rank)
        S = wanted - left @ right
        S *= highest(S.abs(), pattern, scope)
    left, right = _best(wanted - S, basis, rank)
    S = wanted - left @ right
    mask = highest(S.abs(), pattern, scope)
    unit = H.to(torch.float32) / root[:, None] / root
    unit.diagonal().add_(damp)
    return refit(wanted - left @ right, mask, unit) / root, left, right / root


def _best(
    X: Float[Tensor, "out in"], basis: Float[Tensor, "in width"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """The best approximation of this rank whose rows lie in the span of a basis."""
    U, values, V = torch.linalg.svd(X @ basis, full_matrices=False)
    return U[:, :rank] * values[:rank], V[:rank] @ basis.T


def split(rows: int, columns: int, sparsity: float, rank_share: float) -> tuple[int, float]:
    """The rank and the sparsity of the sparse part, that together hold `1 - sparsity` of the numbers.

    `rank_share` of these numbers are in the two factors, but a rank of 1 at least: up to `most_sparse`.
    """
    kept = (1 - sparsity) * rows * columns
    rank = max(1, math.floor(rank_share * kept / (rows + columns)))
    rest = kept - rank * (rows + columns)
    return rank, 1 - max(rest, 1.0) / (rows * columns)


def most_sparse(rows: int, columns: int) -> float:
    """The largest sparsity that `split` can give: a rank of 1, and one number beside."""
    return 1 - (rows + columns + 1) / (rows * columns)
