"""One threshold for the weights of many matrices, found without holding them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Weights that are counted at a time; the bits of a float32 that is not negative, in two halves.
PART, HALF = 1 << 20, 16


@dataclass(frozen=True, slots=True)
class Edge:
    """The size above which weights stay; of those of just this size the first `level` of each matrix do."""

    size: float
    level: tuple[int, ...]

    def mask(self, W: Float[Tensor, "out in"], number: int) -> Bool[Tensor, "out in"]:
        """What stays of a matrix, by its number among all."""
        sizes = W.abs()
        level = sizes == self.size
        first = level.flatten().cumsum(0).view(level.shape) <= self.level[number]
        return (sizes > self.size) | (level & first)


def edge_of(matrices: Callable[[], Iterable[Tensor]], zeros: int) -> Edge:
    """The edge below which so many of all weights lie, exactly (Han and others, arXiv:1506.02626).

    `matrices` gives all of them anew, float32, three times. Floats that are not negative have the order of
    their bits, so the edge is found by counting the upper half of the bits, then the lower half of those
    that share the edge's upper one. Of equal weights those further to the front stay.
    """
    upper = _counted((bits >> HALF for bits in _bits(matrices())), 1 << (31 - HALF))
    first, below = _place(upper, zeros)
    lower = _counted((b[b >> HALF == first] & ((1 << HALF) - 1) for b in _bits(matrices())), 1 << HALF)
    last, more = _place(lower, zeros - below)
    size = float(torch.tensor(first << HALF | last, dtype=torch.int32).view(torch.float32))
    equal = [int((W.abs() == size).sum()) for W in matrices()]
    return Edge(size, tuple(_shared(equal, sum(equal) - (zeros - below - more))))


def _bits(matrices: Iterable[Tensor]) -> Iterator[Tensor]:
    """The bits of all sizes, a part at a time."""
    for W in matrices:
        for part in W.abs().flatten().split(PART):
            yield part.view(torch.int32)


def _counted(parts: Iterable[Tensor], length: int) -> Tensor:
    total = torch.zeros(length, dtype=torch.int64)
    for part in parts:
        total += torch.bincount(part, minlength=length).to(total.device)
    return total


def _place(counts: Tensor, zeros: int) -> tuple[int, int]:
    """The first place up to which so many lie, and how many lie before it."""
    reached = counts.cumsum(0)
    place = int((reached < zeros).sum())
    return place, int(reached[place] - counts[place])


def _shared(counts: Sequence[int], keep: int) -> Iterator[int]:
    """How many stay of each, the first ones first."""
    for count in counts:
        own = min(count, keep)
        keep -= own
        yield own
