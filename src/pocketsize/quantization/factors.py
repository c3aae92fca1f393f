"""Factors by which inputs of a matrix are multiplied or divided, and what feeds them the other way."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def powers_of_two(s: Float[Tensor, "fed"], most: Float[Tensor, "fed"], limit: int) -> Float[Tensor, "fed"]:
    """The powers of two nearest to s around 1: within 2^limit and its inverse, and none above `most`."""
    log = torch.log2(s / (s.max() * s.min()).sqrt()).round().clamp(-limit, limit)
    return torch.minimum(torch.exp2(log), most)


def best_factors(
    candidates: Iterable[Float[Tensor, "fed"]],
    one: Float[Tensor, "fed"],
    loss: Callable[[Float[Tensor, "fed"]], float],
    judged: Callable[[Float[Tensor, "fed"]], float],
) -> Float[Tensor, "fed"] | None:
    """The candidate that loses least; None where that is no less than `one` loses, also by what judges."""
    best, least, tried = one, loss(one), [one]
    for s in candidates:
        if any(torch.equal(s, other) for other in tried):
            continue
        tried.append(s)
        lost = loss(s)
        if lost < least:
            best, least = s, lost
    return best if best is not one and judged(best) < judged(one) else None
