"""The scale search with plain torch, one group at a time, in the order of the compiled loop."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketsize.quantization.compiled import HOPELESS, ROUNDS, SHRINK, SMALLEST_SCALE, STEPS
from pocketsize.quantization.scheme import Scheme


def stored(s: float, digits: int) -> float:
    """`s` rounded to so many significant binary digits, and kept off zero."""
    if abs(s) < SMALLEST_SCALE:
        return -SMALLEST_SCALE if s < 0 else SMALLEST_SCALE
    mantissa, exponent = torch.frexp(torch.tensor(s, dtype=torch.float64))
    return float(torch.ldexp(torch.round(mantissa * 2**digits), exponent - digits))


def zero_of(z: float, s: float, scheme: Scheme) -> float:
    """The zero nearest to z that is stored: a code, or one that puts code 0 on a float16."""
    if not scheme.float_zeros:
        return min(max(round(z), 0), scheme.top)
    return -float(torch.tensor(-s * z).half()) / s


def error_of(w: Tensor, d: Tensor, s: float, z: float, top: int) -> tuple[float, Tensor]:
    """Weighted squared error of a grid, and its codes."""
    q = torch.clamp(torch.round(w.double() / s + z), 0, top)
    return float((d.double() * (s * (q - z) - w.double()) ** 2).sum()), q


def starts(w: Tensor, scheme: Scheme) -> list[tuple[float, float]]:
    """All grids the search begins from: 9 ranges, at both ends where the grid is symmetric."""
    lo, hi = float(w.min()), float(w.max())
    if not scheme.float_zeros:
        lo, hi = min(0.0, lo), max(0.0, hi)
    edge = lo if -lo >= hi else hi
    found: list[tuple[float, float]] = []
    for k in range(STEPS + 1):
        f = 1.0 - SHRINK * k
        if scheme.symmetric:
            ends = (-edge / scheme.middle, abs(edge) / (scheme.middle - 1))
            found += [(stored(f * s, scheme.scale_digits), scheme.middle) for s in ends]
        else:
            s = stored(f * (hi - lo) / scheme.top, scheme.scale_digits)
            low = lo + (1 - f) * (hi - lo) / 2 if scheme.float_zeros else f * lo
            found.append((s, zero_of(-low / s, s, scheme)))
    return found


def best_grid(w: Tensor, d: Tensor, scheme: Scheme) -> float:
    """The least weighted error the search can reach on one group."""
    best = float("inf")
    for s, z in starts(w, scheme):
        for _ in range(ROUNDS + 1):
            error, q = error_of(w, d, s, z, scheme.top)
            hopeless = not scheme.symmetric and error > HOPELESS * best
            best = min(best, error)
            if hopeless:
                break
            s, z = least_squares(w.double(), d.double(), q, s, z, scheme)
    return best


def least_squares(w: Tensor, d: Tensor, q: Tensor, s: float, z: float, scheme: Scheme) -> tuple[float, float]:
    """Scale (and zero) that fit given codes best: weighted linear regression of w on q."""
    if scheme.symmetric:
        t = q - z
        norm = float((d * t * t).sum())
        return (stored(float((d * t * w).sum()) / norm, scheme.scale_digits), z) if norm > 0 else (s, z)
    mean_q, mean_w = float((d * q).sum() / d.sum()), float((d * w).sum() / d.sum())
    var = float((d * (q - mean_q) ** 2).sum())
    cov = float((d * (q - mean_q) * (w - mean_w)).sum())
    if var <= 0 or cov <= 0:
        return s, z
    slope = stored(cov / var, scheme.scale_digits)
    return slope, zero_of(mean_q - mean_w / slope, slope, scheme)
