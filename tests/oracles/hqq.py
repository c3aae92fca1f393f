"""HQQ one group at a time, in double precision, as its equations read."""

from __future__ import annotations

import torch
from torch import Tensor

from oracles.grid import zero_of
from pocketsize.quantization.grid import fit_grid
from pocketsize.quantization.scheme import Scheme


def hqq_slow(W: Tensor, scheme: Scheme, p: float = 0.7, iterations: int = 20) -> tuple[Tensor, Tensor]:
    """Scales and zeros."""
    scale, zero = fit_grid(W, scheme)
    groups = W.double().view(*scale.shape, -1)
    found = zero.clone()
    for r in range(scale.shape[0]):
        for k in range(scale.shape[1]):
            found[r, k] = _zero(groups[r, k], float(scale[r, k]), float(zero[r, k]), scheme, p, iterations)
    return scale, found


def loss_of(w: Tensor, s: float, z: float, scheme: Scheme, p: float) -> float:
    """The p-norm of a group's errors, in steps."""
    q = torch.clamp(torch.round(w.double() / s + z), 0, scheme.top)
    return float(((q - z) - w.double() / s).abs().pow(p).sum())


def _zero(w: Tensor, s: float, z: float, scheme: Scheme, p: float, iterations: int) -> float:
    best, least, beta = z, loss_of(w, s, z, scheme, p), 10.0
    for _ in range(iterations):
        q = torch.clamp(torch.round(w / s + z), 0, scheme.top)
        left = w / s - (q - z)
        error = torch.sign(left) * torch.clamp(left.abs() - left.abs() ** (p - 1) / beta, min=0)
        z = float((q - (w / s - error)).mean())
        stored = zero_of(z, s, scheme)
        if (reached := loss_of(w, s, stored, scheme, p)) < least:
            best, least = stored, reached
        beta *= 1.01
    return best
