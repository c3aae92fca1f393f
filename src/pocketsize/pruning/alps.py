"""ALPS: where weights stay and what they become, chosen together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.errors import NumericalError
from pocketsize.pruning.mask import Scope, highest, zeros_of
from pocketsize.pruning.pattern import Pattern
from pocketsize.pruning.support import refit

ROUNDS = 9
# The penalty of the first rounds, what it is multiplied by, and after how many rounds.
PENALTY, GROWTH, STAGE = 0.4, 2.0, 3
# In between, one score in so many tells where the mask's edge is.
SAMPLED = 8
REFITS = 4


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
    power before, so the penalty means the same for all; it grows by a fixed schedule instead of by how much
    the mask still changes, which leaves one factorisation for every three rounds. What the mask leaves is
    `refit` in the end. W and H are left untouched.
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
    mask = torch.cat([highest(part.abs(), pattern, scope) for part in wanted.split(parts)])
    D, U = wanted * mask, torch.zeros_like(wanted)
    penalty = PENALTY
    for stage in range(0, rounds, STAGE):
        inverse = _inverse(unit, penalty)
        for _ in range(min(STAGE, rounds - stage)):
            U += (slope + penalty * (D - U)) @ inverse
            D = U * torch.cat([_about(part.abs(), pattern, scope) for part in U.split(parts)])
            U -= D
        penalty *= GROWTH
        U /= GROWTH
    mask = torch.cat([highest(part.abs(), pattern, scope) for part in (D + U).split(parts)])
    return refit(wanted, mask, unit, start=D + U, rounds=REFITS) / root


def _inverse(unit: Float[Tensor, "in in"], penalty: float) -> Float[Tensor, "in in"]:
    more = unit.clone()
    more.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(more))


def _about(score: Float[Tensor, "out in"], pattern: Pattern, scope: Scope) -> Bool[Tensor, "out in"]:
    """The mask of an early round: across a large matrix its edge is taken from some of the scores."""
    if pattern.of or scope == "row" or score.numel() < 1 << 16:
        return highest(score, pattern, scope)
    some = score.view(-1)[::SAMPLED]
    return score > some.kthvalue(max(1, zeros_of(len(some), pattern.sparsity))).values
