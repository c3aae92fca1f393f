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

from pocketsize.quantization.scheme import FLOAT_ZEROS, INTEGER_ZEROS, SYMMETRIC

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


@numba.njit(cache=True, nogil=True)
def sweep_kept_block(  # pragma: no cover - compiled
    N, d, width, top, grid, digits, steps, p, W, V, kept, codes, scale, zero, E, v, group, share
):
    """`sweep_block` where some weights must be zero: those are not fitted, and `kept` is 0 at them.

    `share` has room for what each weight of one group counts.
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
                    one = np.float32(kept[a + j, first + t])
                    group[j] = v[a + j, t] * one
                    share[j] = d[a + j] * one
                s, z = fit_group(group, share, top, grid, digits, steps)
                scale[k, first + t] = s
                zero[k, first + t] = z
            for i in range(a, a + width):
                _round_kept(i, first, count, np.float32(top), scale[k], zero[k], W, kept, codes, E, v)
                _absorb(i, count, N, v)


@numba.njit(**INNER, error_model="numpy")
def _round_kept(i, first, count, limit, scale, zero, W, kept, codes, E, v):  # pragma: no cover - compiled
    """`_round` with the code that stands for zero wherever a weight must be zero."""
    for t in range(np.uint64(count)):
        r = np.uint64(first) + t
        s, z = scale[r], zero[r]
        q = _within(np.rint(v[i, t] * (np.float32(1) / s) + z), limit) if kept[i, r] else z
        codes[i, r] = np.uint8(q)
        E[i, r] = W[i, r] - s * (q - z)
        v[i, t] -= s * (q - z)


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
