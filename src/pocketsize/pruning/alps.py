"""ALPS: where weights stay and what they become, chosen together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.errors import NumericalError
from pocketsize.linalg import inverse
from pocketsize.pruning.mask import Scope, about, highest
from pocketsize.pruning.pattern import Pattern
from pocketsize.pruning.support import refit

ROUNDS = 4
# The penalties of the first and the last rounds; up to so many rounds have the one between them, and of
# more so many have one.
FIRST, LAST, ALIKE, STAGE = 0.25, 2.0, 4, 2
REFITS = 3


def alps(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    pattern: Pattern,
    *,
    scope: Scope = "matrix",
    damp: float = 0.01,
    rounds: int = ROUNDS,
    rows: Sequence[int] = (),
    there: Bool[Tensor, "out in"] | None = None,
) -> Float[Tensor, "out in"]:
    """The pruned matrix, or matrices of so many `rows` each that read the same and are stacked.

        minimise over X:   tr (X - W) H (X - W)^T,     H = E[x x^T] damped, X in the pattern

    Alternating directions (ALPS, arXiv:2406.07831): B is free and D lies in the pattern, each round solves
    for B, projects B + U on the pattern, and adds to U how far the two are apart. Inputs are scaled to unit
    power before, so the penalty means the same for all. Four rounds have one penalty and one factorisation;
    with more it grows evenly from `FIRST` to `LAST`, every two rounds, instead of by how much the mask still
    changes. What the mask leaves is `refit` in the end. What is not `there` is zero. W and H are left
    untouched.
    """
    power = H.diagonal().clamp(min=0).to(torch.float32)
    if not bool((power > 0).any()):
        raise NumericalError("every input of this matrix was zero: nothing tells which weights matter")
    root = power.add(1e-10 * power.max()).sqrt()
    unit = H.to(torch.float32) / root[:, None] / root
    unit.diagonal().add_(damp)
    wanted = W.to(torch.float32) * root
    slope = wanted @ unit
    masks = partial(_masks, parts=list(rows) or [len(W)], pattern=pattern, scope=scope, there=there)
    D = wanted * masks(about, wanted.abs())
    U, X = torch.zeros_like(wanted), torch.empty_like(wanted)
    before = 0.0
    for penalty, count in penalties(rounds):
        U *= before / penalty
        before, solved = penalty, _inverse(unit, penalty)
        for _ in range(count):
            torch.sub(D, U, out=X)
            U.addmm_(torch.add(slope, X, alpha=penalty, out=X), solved)
            torch.mul(U, masks(about, torch.abs(U, out=X)), out=D)
            U -= D
    D += U
    mask = masks(highest, D.abs())
    return refit(wanted, mask, unit, start=D, rounds=REFITS) / root


def penalties(rounds: int) -> list[tuple[float, int]]:
    """The penalties of all rounds, each with how many have it."""
    if rounds <= ALIKE:
        return [((FIRST * LAST) ** 0.5, rounds)]
    stages = -(-rounds // STAGE)
    growth = (LAST / FIRST) ** (1 / (stages - 1))
    return [(FIRST * growth**i, min(STAGE, rounds - i * STAGE)) for i in range(stages)]


def _masks(
    how: Callable[..., Tensor],
    score: Float[Tensor, "out in"],
    *,
    parts: list[int],
    pattern: Pattern,
    scope: Scope,
    there: Bool[Tensor, "out in"] | None,
) -> Bool[Tensor, "out in"]:
    """The masks of stacked matrices, each by itself."""
    own = [None] * len(parts) if there is None else there.split(parts)
    each = zip(score.split(parts), own, strict=True)
    return torch.cat([how(part, pattern, scope, there=kept) for part, kept in each])


def _inverse(unit: Float[Tensor, "in in"], penalty: float) -> Float[Tensor, "in in"]:
    more = unit.clone()
    more.diagonal().add_(penalty)
    return inverse(more)
