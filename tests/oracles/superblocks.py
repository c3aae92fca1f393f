"""Grids of a super-block in plain Python numbers: what its groups share, and each group's multiples of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oracles.grid import error_of
from pocketsize.quantization.compiled import HOPELESS, ROUNDS, SMALLEST_SCALE, STEPS
from pocketsize.quantization.gptq import group_order
from pocketsize.quantization.scheme import SUPER_BLOCK, Scheme
from pocketsize.quantization.superblock_loops import CODES, MOVES, UNIT_STEP, UNITS


@dataclass(frozen=True)
class Units:
    """The float16 of which scales are multiples, and that of which lowest values are."""

    scale: float
    low: float


def half(x: float) -> float:
    """The nearest float16."""
    return float(torch.tensor(x, dtype=torch.float64).to(torch.float16))


def units_of(W: Tensor, d: Tensor, scheme: Scheme) -> Units:
    """What the groups of a super-block share; W is one row of it."""
    scales, lows, counts, totals = [], [], [], []
    for a in range(0, SUPER_BLOCK, scheme.group):
        w, own = W[a : a + scheme.group], d[a : a + scheme.group].double()
        free = max(float(w.abs().max()), SMALLEST_SCALE) * 2.0**-20
        s, z = grid_within(w, own, scheme, Units(free, free), 2**20)
        _, q = error_of(w, own, s, z, scheme.top)
        middle = scheme.middle if scheme.symmetric else float((own * q).sum() / own.sum())
        scales.append(abs(s))
        counts.append(float((own * (q - middle) ** 2).sum()))
        lows.append(0.0 if scheme.symmetric else max(s * z, 0.0))
        totals.append(float(own.sum()))
    most = scheme.top_scale
    low = 0.0 if scheme.symmetric else best_unit(lows, totals, most)
    return Units(max(best_unit(scales, counts, most), 2.0**-24), low)


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


def grid_within(
    w: Tensor, d: Tensor, scheme: Scheme, units: Units, most: int | None = None
) -> tuple[float, float]:
    """Scale and zero of a group of a super-block."""
    most = most or scheme.top_scale

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
    return walked(w, d, scheme, units, (best, *found), scale, zero)


def walked(w: Tensor, d: Tensor, scheme: Scheme, units: Units, best, scale, zero) -> tuple[float, float]:
    """From the best grid on to better neighbours, a unit away, as long as there are any."""
    for _ in range(MOVES):
        before = best[0]
        for step in (1, -1):
            s = scale(best[1] + step * units.scale)
            z = float(scheme.middle)
            if scheme.symmetric and s * best[1] < 0:
                continue
            if not scheme.symmetric:
                _, q = error_of(w, d, s, zero(best[1] * best[2], s), scheme.top)
                z = zero(float((d * (s * q - w)).sum() / d.sum()), s)
            best = min(best, (error_of(w, d, s, z, scheme.top)[0], s, z), key=lambda grid: grid[0])
        for step in () if scheme.symmetric else (1, -1):
            z = zero(best[1] * best[2] + step * units.low, best[1])
            error = error_of(w, d, best[1], z, scheme.top)[0]
            best = min(best, (error, best[1], z), key=lambda grid: grid[0])
        if best[0] == before:
            break
    return best[1], best[2]


def starts_within(w: Tensor, scheme: Scheme, scale, zero) -> list[tuple[float, float]]:
    """Ranges, whole and shrunk, on the nearest multiples."""
    lo, hi = min(float(w.min()), 0.0), float(w.max())
    found = []
    for k in range(STEPS + 1):
        f = scheme.top / (scheme.top + CODES * k - 1)
        if scheme.symmetric:
            edge = lo if -lo >= max(hi, 0.0) else hi
            ends = (-edge / scheme.middle, abs(edge) / (scheme.middle - 1))
            found += [(scale(f * s), float(scheme.middle)) for s in ends]
        else:
            s = scale(f * (hi - lo) / scheme.top)
            found.append((s, zero(-(lo + max(1 - f, 0) * (hi - lo) / 2), s)))
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
