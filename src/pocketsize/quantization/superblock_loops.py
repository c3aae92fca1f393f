"""The compiled loops of super-blocks: what their groups share, the search of a group, the sweep of GPTQ.

What they share with other grids (`compiled`) is compiled into them; numba's cache looks at this file alone,
so a change there needs one here.
"""

# pyright: basic
from __future__ import annotations

import numba
import numpy as np

from pocketsize.quantization.compiled import (
    HOPELESS,
    INNER,
    LANES,
    ROUNDS,
    SMALLEST_SCALE,
    _absorb,
    _moments,
    _round,
    _rounded,
    _sums,
    _within,
)
from pocketsize.quantization.scheme import SUPER_BLOCK, SYMMETRIC

# Units of a super-block that are tried: its largest scale is `most` of them, or fewer by so much a trial.
UNITS = 12
UNIT_STEP = np.float32(0.02)
# How many codes fewer a range has from trial to trial; how often neighbours of the best are looked at.
CODES = 0.75
MOVES = 4


@numba.njit(cache=True, nogil=True)
def fit_super_rows(W, d, width, top, grid, steps, most, scale, zero):  # pragma: no cover - compiled
    """Fill `scale` and `zero` for all groups of the rows of W, by super-block (see `fit_grid`)."""
    per = SUPER_BLOCK // width
    found = np.empty((4, per), np.float32)
    for r in range(W.shape[0]):
        for first in range(0, scale.shape[1], per):
            for k in range(per):
                a = (first + k) * width
                _fit_freely(W[r, a : a + width], d[a : a + width], top, grid, steps, found, k)
            unit, low_unit = _units(found, most)
            for k in range(per):
                a = (first + k) * width
                s, z = fit_within(
                    W[r, a : a + width], d[a : a + width], top, grid, steps, most, unit, low_unit
                )
                scale[r, first + k] = s
                zero[r, first + k] = z


@numba.njit(**INNER)
def _fit_freely(w, d, top, grid, steps, found, k):  # pragma: no cover - compiled
    """Column k of `found`: scale and least value of a group that shares nothing, what their errors count."""
    lo, hi, _, total = _sums(w, d, grid)
    peak = max(-lo, hi, SMALLEST_SCALE)
    free = np.float32(peak * 2.0**-20)
    s, z = fit_within(w, d, top, grid, steps, 2**20, free, free)
    _, qd, qqd, _ = _moments(w, d, s, z, np.float32(top))
    found[0, k], found[1, k] = abs(s), s * z
    if grid == SYMMETRIC:
        found[2, k], found[3, k] = qqd - np.float32(2) * z * qd + z * z * total, np.float32(0)
    else:
        found[2, k], found[3, k] = qqd - (qd * qd / total if total > 0 else np.float32(0)), total


@numba.njit(**INNER)
def _units(found, most):  # pragma: no cover - compiled
    """The units of a super-block, by what `_fit_freely` has said of all its groups; for scales not 0."""
    unit = _unit(found[0], found[2], most)
    least = np.float32(2.0**-24)
    return unit if unit > least else least, _unit(found[1], found[3], most)


@numba.njit(**INNER)
def _unit(values, weight, most):  # pragma: no cover - compiled
    """The float16 whose multiples, up to `most`, are nearest to these values, none of them negative."""
    largest = np.float32(0)
    for k in range(values.shape[0]):
        largest = values[k] if values[k] > largest else largest
    best, least = _half(largest / np.float32(most)), np.float32(np.inf)
    for trial in range(UNITS):
        unit = _half(largest / (np.float32(most) - np.float32(trial) * np.float32(most) * UNIT_STEP))
        for _ in range(2):
            error, norm, product = _unit_moments(values, weight, np.float32(most), unit)
            if error < least:
                best, least = unit, error
            if norm <= 0:
                break
            unit = _half(product / norm)
    return best


@numba.njit(**INNER)
def _unit_moments(values, weight, most, unit):  # pragma: no cover - compiled
    """Weighted error of the multiples of a unit, and the sums its least-squares update is made of."""
    error, norm, product = np.float32(0), np.float32(0), np.float32(0)
    for k in range(values.shape[0]):
        n = _within(np.rint(values[k] / unit), most) if unit > 0 else np.float32(0)
        e = n * unit - values[k]
        error += weight[k] * e * e
        norm += weight[k] * n * n
        product += weight[k] * n * values[k]
    return error, norm, product


@numba.njit(**INNER)
def _half(x):  # pragma: no cover - compiled
    """The nearest float16 from 0 up."""
    if x < np.float32(2.0**-13):  # float16 has no more digits than 2^-24 here
        return np.rint(x * np.float32(2.0**24)) * np.float32(2.0**-24)
    return _rounded(x, 11)


@numba.njit(**INNER)
def fit_within(w, d, top, grid, steps, most, unit, low_unit):  # pragma: no cover - compiled
    """Scale and zero of one group of a super-block, whose units are given.

    The search of `fit_group` among scales that are 1 .. `most` units (of either sign on a symmetric grid) and
    zeros that make code 0 stand for minus 0 .. `most` lower units. No scale is 0, one unit does as well.
    Ranges shrink by parts of a code, from one code less than the weights take.
    """
    symmetric = grid == SYMMETRIC
    lo, hi, wd, total = _sums(w, d, grid)
    lo = lo if lo < 0 else np.float32(0)
    middle = np.float32((top + 1) // 2)
    edge = lo if -lo >= hi else hi
    best = np.float32(np.inf)
    s_best = unit
    z_best = middle if symmetric else np.float32(0)
    for k in range(steps + 1):
        f = np.float32(top / (top + CODES * k - 1)) if steps else np.float32(1)
        for sign in range(2 if symmetric else 1):
            if not symmetric:
                s = _multiple(f * (hi - lo) / np.float32(top), unit, most)
                # Wider, a range grows upwards: moved by half a code, what was exact would lie between codes.
                low = lo + (np.float32(1) - f) * (hi - lo) / 2 if f < 1 else lo
                z = _multiple_zero(-low, s, low_unit, most)
            else:
                s = _multiple(
                    f * (abs(edge) / (middle - np.float32(1)) if sign else -edge / middle), unit, most
                )
                z = middle
            for turn in range(ROUNDS + 1 if steps else 1):
                error, qd, qqd, qwd = _moments(w, d, s, z, np.float32(top))
                hopeless = not symmetric and error > HOPELESS * best
                if error < best:
                    best, s_best, z_best = error, s, z
                if turn == ROUNDS or steps == 0 or hopeless:
                    break
                s_next, z_next = _resolve_within(qd, qqd, qwd, wd, total, s, z, grid, most, unit, low_unit)
                if s_next == s and z_next == z:
                    break
                s, z = s_next, z_next
    if steps and total > 0:  # of inputs that were always zero one grid is as good as another
        return _neighbours(w, d, top, grid, most, unit, low_unit, wd, total, best, s_best, z_best)
    return s_best, z_best


@numba.njit(**INNER)
def _neighbours(  # pragma: no cover - compiled
    w, d, top, grid, most, unit, low_unit, wd, total, best, s_best, z_best
):
    """Scale and zero where no step by one unit up or down is better; both change together with the scale."""
    symmetric = grid == SYMMETRIC
    for _ in range(MOVES):
        before = best
        for move in range(2 if symmetric else 4):
            step = np.float32(-1) if move % 2 else np.float32(1)
            s, z = s_best, z_best
            if move >= 2:
                z = _multiple_zero(s_best * z_best + step * low_unit, s, low_unit, most)
            else:
                s = _multiple(s_best + step * unit, unit, most)
                if symmetric:
                    s = s_best if s * s_best < 0 else s
                else:
                    z = _multiple_zero(s_best * z_best, s, low_unit, most)
                    _, qd, _, _ = _moments(w, d, s, z, np.float32(top))
                    z = _multiple_zero((s * qd - wd) / total, s, low_unit, most)
            error, _, _, _ = _moments(w, d, s, z, np.float32(top))
            if error < best:
                best, s_best, z_best = error, s, z
        if best == before:
            break
    return s_best, z_best


@numba.njit(**INNER)
def _resolve_within(qd, qqd, qwd, wd, total, s, z, grid, most, unit, low_unit):  # pragma: no cover - compiled
    """`_resolve` among the scales and zeros of a super-block."""
    if grid == SYMMETRIC:
        norm = qqd - np.float32(2) * z * qd + z * z * total
        return (_multiple((qwd - z * wd) / norm, unit, most) if norm > 0 else s), z
    variance, covariance = qqd * total - qd * qd, qwd * total - qd * wd
    if variance <= np.float32(1e-12) * qqd * total or covariance <= 0:
        return s, z
    s_next = _multiple(covariance / variance, unit, most)
    return s_next, _multiple_zero((s_next * qd - wd) / total, s_next, low_unit, most)


@numba.njit(**INNER)
def _multiple(s, unit, most):  # pragma: no cover - compiled
    """The nearest scale that is 1 .. `most` units, or minus that."""
    n = np.rint(abs(s) / unit)
    n = np.float32(1) if n < 1 else np.float32(most) if n > most else n
    return -n * unit if s < 0 else n * unit


@numba.njit(**INNER)
def _multiple_zero(below, s, low_unit, most):  # pragma: no cover - compiled
    """The zero which makes code 0 stand for minus so many lower units as are nearest to `below`."""
    if low_unit <= 0:
        return np.float32(0)
    return _within(np.rint(below / low_unit), np.float32(most)) * low_unit / s


@numba.njit(cache=True, nogil=True)
def sweep_super_block(  # pragma: no cover - compiled
    N, d, width, top, grid, steps, most, p, W, V, codes, scale, zero, E, v, group
):
    """`sweep_block` for one super-block, whose units are those of its groups as they lie before it."""
    q = p + V.shape[1]
    per = scale.shape[0]
    found = np.empty((4, per), np.float32)
    units = np.empty((2, LANES), np.float32)
    for first in range(p, q, LANES):
        count = LANES if q - first > LANES else q - first
        for i in range(W.shape[0]):
            for t in range(count):
                v[i, t] = V[i, first - p + t]
        for t in range(count):
            for k in range(per):
                a = k * width
                for j in range(width):
                    group[j] = v[a + j, t]
                _fit_freely(group, d[a : a + width], top, grid, steps, found, k)
            units[0, t], units[1, t] = _units(found, most)
        for k in range(per):
            a = k * width
            for t in range(count):
                for j in range(width):
                    group[j] = v[a + j, t]
                s, z = fit_within(group, d[a : a + width], top, grid, steps, most, units[0, t], units[1, t])
                scale[k, first + t] = s
                zero[k, first + t] = z
            for i in range(a, a + width):
                _round(i, first, count, np.float32(top), scale[k], zero[k], W, codes, E, v)
                _absorb(i, count, N, v)
