"""Which weights stay: those with the highest scores, in the places that a pattern leaves open."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.errors import UnsupportedError
from pocketsize.pruning.pattern import Pattern

Scope = Literal["row", "matrix"]
# Of a matrix with so many weights one score in so many stands for all, where that is enough.
LARGE, SAMPLED = 1 << 16, 8


def highest(
    score: Float[Tensor, "out in"],
    pattern: Pattern,
    scope: Scope = "matrix",
    *,
    there: Bool[Tensor, "out in"] | None = None,
) -> Bool[Tensor, "out in"]:
    """True at the weights that stay; of equal scores those further to the front.

    An n:m pattern keeps n of each m neighbours. Otherwise weights compete within their row, or (`matrix`)
    with all: the number of zeros is the nearest to the share that is asked for. What is not `there`, of
    scores from 0 upwards, goes before all others and never stays, be it more than the pattern asks for.
    """
    if there is not None:
        return highest(_behind(score, there), pattern, scope) & there
    if pattern.of:
        return _of_neighbours(score, pattern)
    if scope == "row":
        return _highest(score, score.shape[1] - zeros_of(score.shape[1], pattern.sparsity))
    return _highest(score.reshape(1, -1), score.numel() - zeros_of(score.numel(), pattern.sparsity)).view(
        score.shape
    )


def about(
    score: Float[Tensor, "out in"],
    pattern: Pattern,
    scope: Scope = "matrix",
    *,
    there: Bool[Tensor, "out in"] | None = None,
) -> Bool[Tensor, "out in"]:
    """`highest` where a few weights more or less do not matter: one score in eight tells a matrix's edge."""
    if there is not None:
        return about(_behind(score, there), pattern, scope) & there
    if pattern.of or scope == "row" or score.numel() < LARGE:
        return highest(score, pattern, scope)
    some = score.reshape(-1)[::SAMPLED]
    return score > some.kthvalue(max(1, zeros_of(len(some), pattern.sparsity))).values


def zeros_of(count: int, sparsity: float) -> int:
    """How many of so many weights become zero: at least one stays."""
    return min(round(sparsity * count), count - 1)


def lacking(W: Float[Tensor, "out in"], pattern: Pattern) -> str | None:
    """What a matrix lacks of the zeros of a pattern, as a phrase; None where it has as many, or more.

    Weights may have competed within rows, so a row may be one short of its share.
    """
    rows, columns = W.shape
    if pattern.of:
        if columns % pattern.of:
            return f"rows have {columns} weights"
        full = (W != 0).reshape(rows, -1, pattern.of).sum(2) > pattern.kept
        if broken := int(full.sum()):
            return f"{broken} of {full.numel()} groups of {pattern.of} keep more than {pattern.kept}"
        return None
    zeros = W.numel() - int(W.count_nonzero())
    if zeros >= W.numel() * (pattern.sparsity - 1e-6) - rows:
        return None
    return f"{zeros / W.numel():.4g} of its weights are zero"


def require_fitting(pattern: Pattern, columns: int, name: str) -> None:
    """Refuse an n:m pattern that does not divide the rows of a matrix."""
    if pattern.of and columns % pattern.of:
        raise UnsupportedError(
            f"{name}: rows have {columns} weights, which pattern {pattern.name} does not divide; use another "
            "pattern, or unstructured"
        )


def _behind(score: Float[Tensor, "out in"], there: Bool[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    return score.masked_fill(~there, -1.0)


def _of_neighbours(score: Float[Tensor, "out in"], pattern: Pattern) -> Bool[Tensor, "out in"]:
    """By how many of its neighbours are ahead of each weight; a row for each place among them."""
    few = score.reshape(-1, pattern.of).T.contiguous()
    ahead = torch.zeros(few.shape, dtype=torch.uint8, device=score.device)
    for i in range(pattern.of):
        for j in range(i + 1, pattern.of):
            first = few[i] >= few[j]
            ahead[j] += first
            ahead[i] += ~first
    return (ahead < pattern.kept).T.reshape(score.shape)


def _highest(score: Float[Tensor, "n m"], keep: int) -> Bool[Tensor, "n m"]:
    """The `keep` highest of every row."""
    edge = score.kthvalue(score.shape[1] - keep + 1, dim=1, keepdim=True).values
    above = score > edge
    missing = keep - above.sum(1, keepdim=True)
    level = score == edge
    if bool((level.sum(1, keepdim=True) > missing).any()):
        level &= level.cumsum(1) <= missing
    return above | level
