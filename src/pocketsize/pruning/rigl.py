"""RigL: the number of zeros is fixed, which weights they are is not."""

from __future__ import annotations

import math

from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.pruning.pattern import Pattern
from pocketsize.pruning.schedule import largest


def share_moved(part: float, first: float) -> float:
    """The share of the weights that changes places once this part of the time for it is over.

        f = first / 2 (1 + cos(pi part))

    arXiv:1911.11134, section 3.
    """
    return first / 2 * (1 + math.cos(math.pi * part))


def drop_and_grow(
    W: Float[Tensor, "out in"],
    gradient: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    count: int,
    pattern: Pattern,
) -> Bool[Tensor, "out in"]:
    """The mask after `count` weights changed places: the smallest go, as many come whose gradient is largest.

    What has just gone may come back. As many weights stay as before. In an n:m pattern a weight changes
    places with a neighbour: the smallest of a group goes for the zero with the largest gradient in it, in
    the `count` groups where what goes is smallest.
    """
    if pattern.of:
        return _swapped(W, gradient, mask, count, pattern)
    size, slope = W.abs().masked_fill(~mask, -1.0), gradient.abs()
    held = largest([size], int(mask.sum()) - count)[0]
    grown = largest([slope.masked_fill(held, -1.0)], count)[0]
    return held | grown


def _swapped(
    W: Float[Tensor, "out in"],
    gradient: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    count: int,
    pattern: Pattern,
) -> Bool[Tensor, "out in"]:
    groups = mask.reshape(-1, pattern.of)
    size = W.abs().reshape(groups.shape).masked_fill(~groups, math.inf)
    slope = gradient.abs().reshape(groups.shape).masked_fill(groups, -1.0)
    (least, goes), comes = size.min(1), slope.argmax(1)
    chosen = largest([-least], count)[0].nonzero()[:, 0]
    found = groups.clone()
    found[chosen, goes[chosen]] = False
    found[chosen, comes[chosen]] = True
    return found.view(mask.shape)
