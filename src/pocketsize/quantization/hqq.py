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
    best = torch.empty_like(start)

    def run(a: int, b: int) -> None:
        best[a:b] = start[a:b]
        z, beta, least = start[a:b], BETA, _loss(w[a:b], start[a:b], scheme, p)
        for _ in range(iterations):
            z = _next(w[a:b], z, scheme, p, beta)
            stored = storable_zero(z, scale[a:b], scheme)
            reached = _loss(w[a:b], stored, scheme, p)
            best[a:b] = torch.where(reached < least, stored, best[a:b])
            least, beta = torch.minimum(least, reached), beta * GROWTH

    over_rows(len(w), run)
    return QWeight(snap(W, scale, best, scheme.top), scale, best, scheme)


def _next(
    w: Float[Tensor, "out groups g"], z: Float[Tensor, "out groups"], scheme: Scheme, p: float, beta: float
) -> Float[Tensor, "out groups"]:
    """The mean zero of each group once the errors that z leaves are shrunk by the norm."""
    q = _rounded(w, z, scheme)
    left = w - (q - z[..., None])
    size = left.abs()
    error = left.sign() * (size - size.pow(p - 1) / beta).clamp(min=0)
    return (q - (w - error)).mean(-1)


def _loss(
    w: Float[Tensor, "out groups g"], z: Float[Tensor, "out groups"], scheme: Scheme, p: float
) -> Float[Tensor, "out groups"]:
    return (_rounded(w, z, scheme) - z[..., None] - w).abs_().pow_(p).sum(-1)


def _rounded(
    w: Float[Tensor, "out groups g"], z: Float[Tensor, "out groups"], scheme: Scheme
) -> Float[Tensor, "out groups g"]:
    return (w + z[..., None]).round_().clamp_(0, scheme.top)
