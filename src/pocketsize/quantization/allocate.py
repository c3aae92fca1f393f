"""Which width each matrix gets: the least loss within a number of bytes, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from pocketsize.errors import ResourceError

# The most sizes that are told apart. Bytes of matrices have large common divisors, so that hardly ever binds.
STATES = 1 << 22


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store a matrix: its bytes, and the loss that comes with it."""

    bytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """The number of the choice of each matrix, their bytes together and their loss.

    `curve` is the least loss within each of a number of sizes, as (bytes, loss).
    """

    chosen: tuple[int, ...]
    bytes: int
    loss: float
    curve: tuple[tuple[int, float], ...]


def allocate(matrices: Sequence[Sequence[Choice]], budget_bytes: int, *, points: int = 60) -> Allocation:
    """The choice for each matrix that minimises the sum of losses within the budget.

        minimise  sum_i loss_i(c_i)   where   sum_i bytes_i(c_i) <= budget

    Dynamic programming over bytes in units of their greatest common divisor (multiple-choice knapsack;
    Pisinger, 1995): exact. Only with more than `STATES` units are sizes rounded up to larger ones, so that
    the budget still holds. ResourceError where not even the smallest choices fit.
    """
    least = [min(choice.bytes for choice in choices) for choices in matrices]
    room = budget_bytes - sum(least)
    if room < 0:
        raise ResourceError(f"{budget_bytes} bytes are below the smallest choices: {sum(least)} bytes")
    most = sum(max(choice.bytes for choice in choices) for choices in matrices) - sum(least)
    room = min(room, most)
    extra = [[c.bytes - low for c in choices] for choices, low in zip(matrices, least, strict=True)]
    unit = math.gcd(*(e for sizes in extra for e in sizes)) or 1
    unit = unit if room // unit <= STATES else -(-room // STATES)
    best = np.zeros(room // unit + 1)
    took: list[ndarray] = []
    for choices, sizes in zip(matrices, extra, strict=True):
        best, which = _with_one_more(best, choices, [-(-size // unit) for size in sizes])
        took.append(which)
    chosen, left = [0] * len(matrices), room // unit
    for i in range(len(matrices) - 1, -1, -1):
        chosen[i] = int(took[i][left])
        left -= -(-extra[i][chosen[i]] // unit)
    at = np.unique(np.linspace(0, room // unit, min(points, room // unit + 1)).round().astype(int))
    picked = [choices[k] for choices, k in zip(matrices, chosen, strict=True)]
    return Allocation(
        tuple(chosen),
        sum(choice.bytes for choice in picked),
        math.fsum(choice.loss for choice in picked),
        tuple((sum(least) + int(k) * unit, float(best[k])) for k in at),
    )


def _with_one_more(
    best: Float[ndarray, "room"], choices: Sequence[Choice], sizes: Sequence[int]
) -> tuple[Float[ndarray, "room"], ndarray]:
    """The least loss within each size with one more matrix, and the number of its choice there."""
    new, which = np.full(len(best), np.inf), np.zeros(len(best), np.uint8)
    for number, (choice, size) in enumerate(zip(choices, sizes, strict=True)):
        if size >= len(best):
            continue
        found = best[: len(best) - size] + choice.loss
        better = found < new[size:]
        new[size:][better] = found[better]
        which[size:][better] = number
    return new, which
