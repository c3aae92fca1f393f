"""HQQ one group at a time, in double precision, as its equations read."""

from __future__ import annotations

import torch
from torch import Tensor

from oracles.grid import zero_of
from pocketsize.quantization.grid import fit_grid
from pocketsize.quantization.scheme import Scheme


def hqq_slow(W: Tensor, scheme: Scheme, p: float = 0.7, iterations: int = 20) -> tuple[Tensor, Tensor]:
    """Scales and zeros."""
    scale, best = fit_grid(W, scheme)
    groups = W.double().view(*scale.shape, -1)
    each = [(r, k) for r in range(scale.shape[0]) for k in range(scale.shape[1])]
    z = {at: float(best[at]) for at in each}
    least = {at: loss_of(groups[at], float(scale[at]), z[at], scheme, p) for at in each}
    beta = 10.0
    for _ in range(iterations):
        for at in each:
            z[at] = _next(groups[at], float(scale[at]), z[at], scheme, p, beta)
            stored = zero_of(z[at], float(scale[at]), scheme)
            if (reached := loss_of(groups[at], float(scale[at]), stored, scheme, p)) < least[at]:
                best[at], least[at] = stored, reached
        beta *= 1.01
    return scale, best


def loss_of(w: Tensor, s: float, z: float, scheme: Scheme, p: float) -> float:
    """The p-norm of a group's errors, in steps."""
    q = torch.clamp(torch.round(w.double() / s + z), 0, scheme.top)
    return float(((q - z) - w.double() / s).abs().pow(p).sum())


def _next(w: Tensor, s: float, z: float, scheme: Scheme, p: float, beta: float) -> float:
    q = torch.clamp(torch.round(w / s + z), 0, scheme.top)
    left = w / s - (q - z)
    error = torch.sign(left) * torch.clamp(left.abs() - left.abs() ** (p - 1) / beta, min=0)
    return float((q - (w / s - error)).mean())
