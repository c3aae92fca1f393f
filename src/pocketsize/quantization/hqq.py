"""HQQ: no data; zeros are moved until few weights are far from their codes, however far those few are."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pocketsize.quantization.grid import QWeight, fit_grid, snap, storable_zero
from pocketsize.quantization.rows import over_rows
from pocketsize.quantization.scheme import Scheme

P, BETA, GROWTH, ITERATIONS = 0.7, 10.0, 1.01, 20


def hqq(W: Float[Tensor, "out in"], scheme: Scheme, *, p: float = P, iterations: int = ITERATIONS) -> QWeight:
    """Quantize to the grid whose zeros lose least by a norm that outliers hardly move.

        minimise over z:   sum_j |s (q_j - z) - w_j|^p,     p < 1,   q_j = clamp(round(w_j / s + z))

    By half-quadratic splitting (Badri and Shaji, "Half-quadratic quantization of large machine learning
    models", 2023): an error e that is shrunk by the norm and a zero that is the mean of what is left take
    turns; the scale stays that of the range. Two things differ from the authors' program: errors are
    measured in steps of the grid, so that the result does not depend on the unit of the weights, and each
    group keeps the best of all zeros as they are stored, so that none ends worse than it began. W is left
    untouched.
    """
    scale, start = fit_grid(W, scheme)
    w = (W.to(torch.float32).view(*scale.shape, -1) / scale[..., None]).contiguous()  # in steps
    zero = torch.empty_like(start)

    def run(a: int, b: int) -> None:
        zero[a:b] = _zeros(w[a:b], start[a:b], scale[a:b], scheme, p, iterations)

    over_rows(len(w), run)
    return QWeight(snap(W, scale, zero, scheme.top), scale, zero, scheme)


def _zeros(
    w: Float[Tensor, "out groups g"],
    start: Float[Tensor, "out groups"],
    scale: Float[Tensor, "out groups"],
    scheme: Scheme,
    p: float,
    iterations: int,
) -> Float[Tensor, "out groups"]:
    """The best zero of each group, from where it starts."""

    def rounded(z: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups g"]:
        return (w + z[..., None]).round_().clamp_(0, scheme.top)

    def loss(z: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups"]:
        return (rounded(z) - z[..., None] - w).abs_().pow_(p).sum(-1)

    best, least, z, beta = start, loss(start), start, BETA
    for _ in range(iterations):
        q = rounded(z)
        left = w - (q - z[..., None])
        size = left.abs()
        error = left.sign() * (size - size.pow(p - 1) / beta).clamp(min=0)
        z = (q - (w - error)).mean(-1)
        stored = storable_zero(z, scale, scheme)
        reached = loss(stored)
        better = reached < least
        if not bool(better.any()):
            break
        best, least = torch.where(better, stored, best), torch.where(better, reached, least)
        beta *= GROWTH
    return best
