"""The compiled loops: the scale search of a group, and the column sweep of GPTQ.

They stand in one file because numba's cache looks at the file of the function it compiled, not at
those it calls: with all of them here, a change to one recompiles all. What only compiled code calls has no
wrapper for Python and no cache of its own, which saves a tenth of the compilation.
"""

# pyright: basic
from __future__ import annotations

from typing import Any

import numba
import numpy as np

from pocketsize.quantization.scheme import FLOAT_ZEROS, INTEGER_ZEROS, SUPER_BLOCK, SYMMETRIC

STEPS = 8
SHRINK = 0.08
ROUNDS = 2
# A start that is so much worse than the best grid so far is not refined; on a symmetric grid, where both
# signs of the scale compete, the worse of them often ends as the better one.
HOPELESS = np.float32(1.5)
# Outputs side by side: 64 inputs of them are half of a first-level cache.
LANES = 64
# Below 2^-17 a scale of 8 digits is no longer exact in float16, whose last place is 2^-24.
SMALLEST_SCALE = 2.0**-17
# Units of a super-block that are tried: its largest scale is `most` of them, or fewer by so much a trial.
UNITS = 12
UNIT_STEP = np.float32(0.02)
# Significant digits of scales of groups while their super-block has no unit yet.
DIGITS = 8

INNER: Any = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


@numba.njit(cache=True, nogil=True)
def fit_rows(W, d, width, top, grid, digits, steps, scale, zero):  # pragma: no cover - compiled
    """Fill `scale` and `zero` for all groups of the rows of W (see `fit_grid`)."""
    for r in range(W.shape[0]):
        for k in range(W.shape[1] // width):
            a = k * width
            s, z = fit_group(W[r, a : a + width], d[a : a + width], top, grid, digits, steps)
            scale[r, k] = s
            zero[r, k] = z


@numba.njit(**INNER)
def fit_group(w, d, top, grid, digits, steps):  # pragma: no cover - compiled
    """Scale and zero of one group."""
    symmetric = grid == SYMMETRIC
    lo, hi, wd, total = _sums(w, d, grid)
    middle = np.float32((top + 1) // 2)
    edge = lo if -lo >= hi else hi
    best = np.float32(np.inf)
    s_best = np.float32(0)
    z_best = middle if symmetric else np.float32(0)
    for k in range(steps + 1):
        f = np.float32(1.0 - SHRINK * k)
        for sign in range(2 if symmetric else 1):
            if not symmetric:
                s = _stored(f * (hi - lo) / np.float32(top), digits)
                # Whole zeros keep 0 on the grid, and the range shrinks towards it; others towards its middle.
                low = lo + (np.float32(1) - f) * (hi - lo) / 2 if grid == FLOAT_ZEROS else f * lo
                z = _zero(-low / s, s, np.float32(top), grid)
            else:
                # Once the extreme on the far code, which is one step further out, once on the near one.
                s = _stored(f * (abs(edge) / (middle - np.float32(1)) if sign else -edge / middle), digits)
                z = middle
            for turn in range(ROUNDS + 1 if steps else 1):
                error, qd, qqd, qwd = _moments(w, d, s, z, np.float32(top))
                hopeless = not symmetric and error > HOPELESS * best
                if error < best:
                    best, s_best, z_best = error, s, z
                if turn == ROUNDS or steps == 0 or hopeless:
                    break
                s_next, z_next = _resolve(qd, qqd, qwd, wd, total, s, z, grid, top, digits)
                if s_next == s and z_next == z:
                    break
                s, z = s_next, z_next
    return s_best, z_best


@numba.njit(**INNER)
def _resolve(qd, qqd, qwd, wd, total, s, z, grid, top, digits):  # pragma: no cover - compiled
    """Scale and zero that fit best the codes whose weighted moments are given (least squares)."""
    if grid == SYMMETRIC:
        norm = qqd - np.float32(2) * z * qd + z * z * total
        if norm <= 0:
            return s, z
        return _stored((qwd - z * wd) / norm, digits), z
    variance = qqd * total - qd * qd
    covariance = qwd * total - qd * wd
    if variance <= np.float32(1e-12) * qqd * total or covariance <= 0:
        return s, z
    s_next = _stored(covariance / variance, digits)
    return s_next, _zero((qd - wd / s_next) / total, s_next, np.float32(top), grid)


@numba.njit(**INNER)
def _zero(z, s, top, grid):  # pragma: no cover - compiled
    """The nearest zero to z that can be stored: a code, or what makes the value of code 0 a float16."""
    if grid == INTEGER_ZEROS:
        return _within(np.rint(z), top)
    least = -s * z
    if abs(least) < np.float32(2.0**-13):  # float16 has no more digits than 2^-24 here
        return -np.rint(least * np.float32(2.0**24)) * np.float32(2.0**-24) / s
    return -_rounded(least, 11) / s


@numba.njit(**INNER, fastmath={"reassoc", "nsz", "contract", "nnan", "ninf"})
def _moments(w, d, s, z, top):  # pragma: no cover - compiled
    """Weighted error of a grid on one group, and those moments its least-squares update needs that vary."""
    inverse = np.float32(1) / s
    error = np.float32(0)
    qd = np.float32(0)
    qqd = np.float32(0)
    qwd = np.float32(0)
    for i in range(w.shape[0]):
        q = _within(np.rint(w[i] * inverse + z), top)
        e = s * (q - z) - w[i]
        error += e * e * d[i]
        qd += q * d[i]
        qqd += q * q * d[i]
        qwd += q * w[i] * d[i]
    return error, qd, qqd, qwd


@numba.njit(**INNER, fastmath={"reassoc", "nsz", "nnan", "ninf"})
def _sums(w, d, grid):  # pragma: no cover - compiled
    """Of one group its range, with 0 unless zeros are floats; its weighted sum; the sum of weights `d`."""
    lo = hi = w[0] if grid == FLOAT_ZEROS else np.float32(0)
    wd = np.float32(0)
    total = np.float32(0)
    for i in range(w.shape[0]):
        lo = w[i] if w[i] < lo else lo
        hi = w[i] if w[i] > hi else hi
        wd += w[i] * d[i]
        total += d[i]
    return lo, hi, wd, total


@numba.njit(**INNER)
def _within(x, top):  # pragma: no cover - compiled
    """The nearest number from 0 to `top`; Python's min and max would be compiled anew wherever they stand."""
    return np.float32(0) if x < 0 else top if x > top else x


@numba.njit(**INNER)
def _stored(s, digits):  # pragma: no cover - compiled
    """The nearest scale with `digits` significant binary digits that is not too small to store."""
    if abs(s) < np.float32(SMALLEST_SCALE):
        return np.float32(-SMALLEST_SCALE) if s < 0 else np.float32(SMALLEST_SCALE)
    return _rounded(s, digits)


@numba.njit(**INNER)
def _rounded(x, digits):  # pragma: no cover - compiled
    """The nearest number with so many significant binary digits."""
    # Veltkamp's splitting; it needs exact IEEE order, so no fast maths here.
    c = np.float32(np.float32(2.0 ** (24 - digits) + 1.0) * x)
    return np.float32(c - np.float32(c - x))


@numba.njit(cache=True, nogil=True)
def sweep_block(  # pragma: no cover - compiled
    N, d, width, top, grid, digits, steps, p, W, V, codes, scale, zero, E, v, group
):
    """Quantize a block of inputs of as many outputs as V has, from p on; all matrices are "in out".

    W holds all weights, V those from p on as corrected for all inputs before the block. E receives W less
    what the codes stand for. Outputs are taken `LANES` at a time into `v` ("in LANES"), where one
    instruction works on several of them; `group` has room for one group.
    """
    q = p + V.shape[1]
    for first in range(p, q, LANES):
        count = LANES if q - first > LANES else q - first
        for i in range(W.shape[0]):
            for t in range(count):
                v[i, t] = V[i, first - p + t]
        for k in range(scale.shape[0]):
            a = k * width
            for t in range(count):
                for j in range(width):
                    group[j] = v[a + j, t]
                s, z = fit_group(group, d[a : a + width], top, grid, digits, steps)
                scale[k, first + t] = s
                zero[k, first + t] = z
            for i in range(a, a + width):
                _round(i, first, count, np.float32(top), scale[k], zero[k], W, codes, E, v)
                _absorb(i, count, N, v)


@numba.njit(**INNER, error_model="numpy")
def _round(i, first, count, limit, scale, zero, W, codes, E, v):  # pragma: no cover - compiled
    """Codes of an input; what they leave of its corrected weights stays in v[i]."""
    for t in range(np.uint64(count)):  # unsigned, or each index would be checked and nothing vectorised
        r = np.uint64(first) + t
        s, z = scale[r], zero[r]
        q = _within(np.rint(v[i, t] * (np.float32(1) / s) + z), limit)
        codes[i, r] = np.uint8(q)
        E[i, r] = W[i, r] - s * (q - z)
        v[i, t] -= s * (q - z)


@numba.njit(**INNER, fastmath={"contract", "nsz"})
def _absorb(i, count, N, v):  # pragma: no cover - compiled
    """Later inputs absorb the error of input i."""
    for j in range(np.uint64(i + 1), np.uint64(v.shape[0])):
        n = N[i, j]
        for t in range(np.uint64(count)):
            v[j, t] -= v[i, t] * n


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
            unit = _unit(found[0], found[2], most)
            low_unit = _unit(found[1], found[3], most)
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
    s, z = fit_group(w, d, top, grid, DIGITS, steps)
    if grid != SYMMETRIC and z < 0:  # all of it lies above 0, where no code 0 can
        s, z = _stored(_sums(w, d, grid)[1] / np.float32(top), DIGITS), np.float32(0)
    _, qd, qqd, _ = _moments(w, d, s, z, np.float32(top))
    total = np.float32(0)
    for i in range(w.shape[0]):
        total += d[i]
    if grid == SYMMETRIC:
        found[0, k], found[1, k] = abs(s), np.float32(0)
        found[2, k], found[3, k] = qqd - np.float32(2) * z * qd + z * z * total, np.float32(0)
    else:
        least = s * z if z > 0 else np.float32(0)
        found[0, k], found[1, k] = s, least
        found[2, k], found[3, k] = qqd - (qd * qd / total if total > 0 else np.float32(0)), total


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
    zeros that make code 0 stand for minus 0 .. `most` lower units. No scale is 0: one unit does as well.
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
        f = np.float32(1.0 - SHRINK * k)
        for sign in range(2 if symmetric else 1):
            if not symmetric:
                s = _multiple(f * (hi - lo) / np.float32(top), unit, most)
                low = lo + (np.float32(1) - f) * (hi - lo) / 2
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
            units[0, t], units[1, t] = _unit(found[0], found[2], most), _unit(found[1], found[3], most)
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
