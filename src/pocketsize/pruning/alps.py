"""ALPS: where weights stay and what they become, chosen together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.errors import NumericalError
from pocketsize.pruning.mask import Scope, about, highest
from pocketsize.pruning.pattern import Pattern
from pocketsize.pruning.support import refit

ROUNDS = 6
# The penalties of the first and the last rounds, and how many rounds have one.
FIRST, LAST, STAGE = 0.2, 1.8, 2
REFITS = 2


def alps(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    pattern: Pattern,
    *,
    scope: Scope = "matrix",
    damp: float = 0.01,
    rounds: int = ROUNDS,
    rows: Sequence[int] = (),
) -> Float[Tensor, "out in"]:
    """The pruned matrix, or matrices of so many `rows` each that read the same and are stacked.

        minimise over X:   tr (X - W) H (X - W)^T,     H = E[x x^T] damped, X in the pattern

    Alternating directions (ALPS, arXiv:2406.07831): B is free and D lies in the pattern, each round solves
    for B, projects B + U on the pattern, and adds to U how far the two are apart. Inputs are scaled to unit
    power before, so the penalty means the same for all; it grows evenly from `FIRST` to `LAST` instead of by
    how much the mask still changes, which leaves one factorisation for every two rounds. What the mask leaves
    is `refit` in the end. W and H are left untouched.
    """
    power = H.diagonal().clamp(min=0).to(torch.float32)
    if not bool((power > 0).any()):
        raise NumericalError("every input of this matrix was zero: nothing tells which weights matter")
    root = power.add(1e-10 * power.max()).sqrt()
    unit = H.to(torch.float32) / root[:, None] / root
    unit.diagonal().add_(damp)
    wanted = W.to(torch.float32) * root
    slope = wanted @ unit
    parts = list(rows) or [len(W)]
    D = wanted * _masks(about, wanted.abs(), parts, pattern, scope)
    U, X = torch.zeros_like(wanted), torch.empty_like(wanted)
    stages = -(-rounds // STAGE)
    penalty, growth = FIRST, (LAST / FIRST) ** (1 / max(1, stages - 1))
    for stage in range(stages):
        if stage:
            penalty *= growth
            U /= growth
        inverse = _inverse(unit, penalty)
        for _ in range(min(STAGE, rounds - stage * STAGE)):
            torch.sub(D, U, out=X)
            U.addmm_(torch.add(slope, X, alpha=penalty, out=X), inverse)
            torch.mul(U, _masks(about, torch.abs(U, out=X), parts, pattern, scope), out=D)
            U -= D
    D += U
    mask = _masks(highest, D.abs(), parts, pattern, scope)
    return refit(wanted, mask, unit, start=D, rounds=REFITS) / root


def _masks(
    how: Callable[[Tensor, Pattern, Scope], Tensor],
    score: Float[Tensor, "out in"],
    rows: list[int],
    pattern: Pattern,
    scope: Scope,
) -> Bool[Tensor, "out in"]:
    """The masks of stacked matrices, each by itself."""
    return torch.cat([how(part, pattern, scope) for part in score.split(rows)])


def _inverse(unit: Float[Tensor, "in in"], penalty: float) -> Float[Tensor, "in in"]:
    more = unit.clone()
    more.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(more))
