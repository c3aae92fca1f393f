"""Grids of a super-block in plain Python numbers: what its groups share, and each group's multiples of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oracles.grid import error_of, least_squares, starts, stored
from pocketsize.quantization.compiled import DIGITS, HOPELESS, ROUNDS, SHRINK, STEPS, UNIT_STEP, UNITS
from pocketsize.quantization.gptq import group_order
from pocketsize.quantization.scheme import SUPER_BLOCK, Scheme


@dataclass(frozen=True)
class Units:
    """The float16 of which scales are multiples, and that of which lowest values are."""

    scale: float
    low: float


def half(x: float) -> float:
    """The nearest float16."""
    return float(torch.tensor(x, dtype=torch.float64).to(torch.float16))


def free_grid(w: Tensor, d: Tensor, scheme: Scheme) -> tuple[float, float]:
    """Scale and zero of a group that shares nothing."""
    alone = replace(scheme, group=None, scale_bits=16, bits=min(scheme.bits, 8) if scheme.bits != 6 else 8)
    object.__setattr__(alone, "bits", scheme.bits)  # six bits have no scheme without super-blocks
    best, found = float("inf"), (0.0, 0.0)
    for s, z in starts(w, alone):
        for _ in range(ROUNDS + 1):
            error, q = error_of(w, d, s, z, scheme.top)
            hopeless = not scheme.symmetric and error > HOPELESS * best
            if error < best:
                best, found = error, (s, z)
            if hopeless:
                break
            s, z = least_squares(w.double(), d.double(), q, s, z, alone)
    s, z = found
    if not scheme.symmetric and z < 0:
        return stored(float(w.max()) / scheme.top, DIGITS), 0.0
    return s, z


def units_of(W: Tensor, d: Tensor, scheme: Scheme) -> Units:
    """What the groups of a super-block share; W is one row of it."""
    scales, lows, counts, totals = [], [], [], []
    for a in range(0, SUPER_BLOCK, scheme.group):
        w, own = W[a : a + scheme.group], d[a : a + scheme.group].double()
        s, z = free_grid(w, own, scheme)
        _, q = error_of(w, own, s, z, scheme.top)
        middle = scheme.middle if scheme.symmetric else float((own * q).sum() / own.sum())
        scales.append(abs(s))
        counts.append(float((own * (q - middle) ** 2).sum()))
        lows.append(0.0 if scheme.symmetric else max(s * z, 0.0))
        totals.append(float(own.sum()))
    most = scheme.top_scale
    return Units(best_unit(scales, counts, most), 0.0 if scheme.symmetric else best_unit(lows, totals, most))


def best_unit(values: list[float], weights: list[float], most: int) -> float:
    """The float16 whose whole multiples lie nearest to all values."""

    def multiples(unit: float) -> list[int]:
        return [min(max(round(v / unit), 0), most) if unit > 0 else 0 for v in values]

    def error(unit: float) -> float:
        at = zip(values, weights, multiples(unit), strict=True)
        return sum(c * (n * unit - v) ** 2 for v, c, n in at)

    tried = []
    for trial in range(UNITS):
        unit = half(max(values) / (most * (1 - trial * float(UNIT_STEP))))
        tried.append(unit)
        n = multiples(unit)
        norm = sum(c * k * k for c, k in zip(weights, n, strict=True))
        if norm > 0:
            tried.append(half(sum(c * k * v for v, c, k in zip(values, weights, n, strict=True)) / norm))
    return min(tried, key=error)


def grid_within(w: Tensor, d: Tensor, scheme: Scheme, units: Units) -> tuple[float, float]:
    """Scale and zero of a group of a super-block."""
    most = scheme.top_scale

    def scale(s: float) -> float:
        n = min(max(round(abs(s) / units.scale), 1), most)
        return (-n if s < 0 else n) * units.scale

    def zero(below: float, s: float) -> float:
        n = min(max(round(below / units.low), 0), most) if units.low > 0 else 0
        return n * units.low / s

    best, found = float("inf"), (0.0, 0.0)
    for s, z in starts_within(w, scheme, scale, zero):
        for _ in range(ROUNDS + 1):
            error, q = error_of(w, d, s, z, scheme.top)
            hopeless = not scheme.symmetric and error > HOPELESS * best
            if error < best:
                best, found = error, (s, z)
            if hopeless:
                break
            s, z = solved(w.double(), d.double(), q, s, z, scheme, scale, zero)
    return found


def starts_within(w: Tensor, scheme: Scheme, scale, zero) -> list[tuple[float, float]]:
    """Ranges, whole and shrunk, on the nearest multiples."""
    lo, hi = min(float(w.min()), 0.0), float(w.max())
    found = []
    for k in range(STEPS + 1):
        f = 1.0 - SHRINK * k
        if scheme.symmetric:
            edge = lo if -lo >= max(hi, 0.0) else hi
            ends = (-edge / scheme.middle, abs(edge) / (scheme.middle - 1))
            found += [(scale(f * s), float(scheme.middle)) for s in ends]
        else:
            s = scale(f * (hi - lo) / scheme.top)
            found.append((s, zero(-(lo + (1 - f) * (hi - lo) / 2), s)))
    return found


def solved(w, d, q, s, z, scheme: Scheme, scale, zero) -> tuple[float, float]:
    """The nearest multiples to what least squares gives for these codes."""
    if scheme.symmetric:
        t = q - z
        norm = float((d * t * t).sum())
        return (scale(float((d * t * w).sum()) / norm), z) if norm > 0 else (s, z)
    mean_q, mean_w = float((d * q).sum() / d.sum()), float((d * w).sum() / d.sum())
    var, cov = float((d * (q - mean_q) ** 2).sum()), float((d * (q - mean_q) * (w - mean_w)).sum())
    if var <= 0 or cov <= 0:
        return s, z
    slope = scale(cov / var)
    return slope, zero(slope * mean_q - mean_w, slope)


def gptq_slow(W: Tensor, H: Tensor, scheme: Scheme, damp: float = 0.01) -> tuple[Tensor, Tensor]:
    """Codes and dequantized matrix, one column at a time, from the inverse of H."""
    n, width = W.shape[1], scheme.group
    perm = group_order(H.diagonal(), width, SUPER_BLOCK)
    H = H.double()[perm][:, perm]
    U = torch.linalg.cholesky(
        torch.linalg.inv(H + damp * H.diagonal().mean() * torch.eye(n)), upper=True
    ).float()
    weight, W = 1 / U.diagonal() ** 2, W[:, perm].clone()
    codes, Q = torch.empty_like(W), torch.empty_like(W)
    for i in range(n):
        if i % SUPER_BLOCK == 0:
            part = slice(i, i + SUPER_BLOCK)
            units = [units_of(row, weight[part], scheme) for row in W[:, part]]
        if i % width == 0:
            part = slice(i, i + width)
            rows = zip(W[:, part], units, strict=True)
            scale, zero = torch.tensor([grid_within(row, weight[part], scheme, u) for row, u in rows]).T
        codes[:, i] = (W[:, i] * (1 / scale) + zero).round().clamp(0, scheme.top)
        Q[:, i] = scale * (codes[:, i] - zero)
        W[:, i + 1 :] -= torch.outer((W[:, i] - Q[:, i]) / U[i, i], U[i, i + 1 :])
    back = torch.argsort(perm)
    return codes[:, back], Q[:, back]
