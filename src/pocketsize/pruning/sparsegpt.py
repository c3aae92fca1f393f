"""SparseGPT: weights go column by column, and the columns still to come absorb each error."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.linalg import Factor, feedback_factor
from pocketsize.pruning.mask import highest
from pocketsize.pruning.pattern import Pattern

BLOCK = 128


def sparsegpt(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    pattern: Pattern,
    *,
    damp: float = 0.01,
    block: int = BLOCK,
    mask: Bool[Tensor, "out in"] | None = None,
    there: Bool[Tensor, "out in"] | None = None,
    factor: Factor | None = None,
) -> Float[Tensor, "out in"]:
    """The pruned matrix (arXiv:2301.00774, algorithm 1).

    Each block of columns chooses among its weights, as corrected so far, those that cost least:
    w^2 / U_jj^2, U the Cholesky factor of H^-1, which is w^2 d_j of `feedback_factor`. An n:m pattern chooses
    when its n neighbours are reached. What is not `there` is zero, and counts. Where a `mask` is given
    nothing is chosen. `factor` is that of H, if it is known. W and H are left untouched.
    """
    factor, columns = factor or feedback_factor(H, damp), W.shape[1]
    X, E = torch.empty_like(W, dtype=torch.float32), torch.zeros_like(W, dtype=torch.float32)
    step = max(block - block % pattern.of, pattern.of) if pattern.of else block
    for a in range(0, columns, step):
        b = min(a + step, columns)
        carried = E[:, :a] @ factor.M[:a, a:b]
        stays = torch.ones_like(carried, dtype=torch.bool) if mask is None else mask[:, a:b]
        if mask is None and not pattern.of:
            worth = _corrected(W, carried, factor, a, b).square() * factor.d[a:b]
            stays = highest(worth, pattern, there=_columns(there, a, b))
        for j in range(a, b):
            i = j - a
            if mask is None and pattern.of and i % pattern.of == 0:
                ahead = slice(j, j + pattern.of)
                reached = carried[:, i : i + pattern.of] + E[:, a:j] @ factor.M[a:j, ahead]
                few = _corrected(W, reached, factor, j, j + pattern.of).square() * factor.d[ahead]
                own = _columns(there, j, j + pattern.of)
                stays[:, i : i + pattern.of] = highest(few, pattern, there=own)
            X[:, j] = (W[:, j] + carried[:, i] + E[:, a:j] @ factor.M[a:j, j]) * stays[:, i]
            E[:, j] = W[:, j] - X[:, j]
    return X


def _columns(there: Tensor | None, a: int, b: int) -> Tensor | None:
    return None if there is None else there[:, a:b]


def _corrected(W: Tensor, carried: Tensor, factor: Factor, a: int, b: int) -> Float[Tensor, "out part"]:
    """The best weights of columns a to b, as long as all of them and those behind are free."""
    return W[:, a:b] + torch.linalg.solve_triangular(
        factor.M[a:b, a:b], carried, upper=True, unitriangular=True, left=False
    )
