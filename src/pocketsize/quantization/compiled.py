"""The compiled loops: the scale search of a group, and the column sweep of GPTQ.

They stand in one file because numba's cache looks at the file of the function it compiled, not at
those it calls: with all of them here, a change to one recompiles all.
"""

# pyright: basic
from __future__ import annotations

import numba
import numpy as np

STEPS = 8
SHRINK = 0.08
ROUNDS = 2
# Below 2^-17 a scale of 8 digits is no longer exact in float16, whose last place is 2^-24.
SMALLEST_SCALE = 2.0**-17


@numba.njit(cache=True, nogil=True)
def fit_rows(W, d, width, top, symmetric, digits, steps, scale, zero):  # pragma: no cover - compiled
    """Fill `scale` and `zero` for all groups of the rows of W (see `fit_grid`)."""
    for r in range(W.shape[0]):
        for k in range(W.shape[1] // width):
            a = k * width
            s, z = fit_group(W[r, a : a + width], d[a : a + width], top, symmetric, digits, steps)
            scale[r, k] = s
            zero[r, k] = z


@numba.njit(cache=True, nogil=True)
def fit_group(w, d, top, symmetric, digits, steps):  # pragma: no cover - compiled
    """Scale and zero of one group."""
    lo, hi, wd, total = _sums(w, d)
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
                z = min(max(np.rint(-f * lo / s), np.float32(0)), np.float32(top))
            else:
                # Once the extreme on the far code, which is one step further out, once on the near one.
                s = _stored(f * (abs(edge) / (middle - np.float32(1)) if sign else -edge / middle), digits)
                z = middle
            for turn in range(ROUNDS + 1 if steps else 1):
                error, qd, qqd, qwd = _moments(w, d, s, z, np.float32(top))
                if error < best:
                    best, s_best, z_best = error, s, z
                if turn == ROUNDS or steps == 0:
                    break
                s_next, z_next = _resolve(qd, qqd, qwd, wd, total, s, z, symmetric, top, digits)
                if s_next == s and z_next == z:
                    break
                s, z = s_next, z_next
    return s_best, z_best


@numba.njit(cache=True, nogil=True, inline="always")
def _resolve(qd, qqd, qwd, wd, total, s, z, symmetric, top, digits):  # pragma: no cover - compiled
    """Scale and zero that fit best the codes whose weighted moments are given (least squares)."""
    if symmetric:
        norm = qqd - np.float32(2) * z * qd + z * z * total
        if norm <= 0:
            return s, z
        return _stored((qwd - z * wd) / norm, digits), z
    variance = qqd * total - qd * qd
    covariance = qwd * total - qd * wd
    if variance <= np.float32(1e-12) * qqd * total or covariance <= 0:
        return s, z
    s_next = _stored(covariance / variance, digits)
    z_next = np.rint((qd - wd / s_next) / total)
    return s_next, min(max(z_next, np.float32(0)), np.float32(top))


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract", "nnan", "ninf"})
def _moments(w, d, s, z, top):  # pragma: no cover - compiled
    """Weighted error of a grid on one group, and those moments its least-squares update needs that vary."""
    inverse = np.float32(1) / s
    error = np.float32(0)
    qd = np.float32(0)
    qqd = np.float32(0)
    qwd = np.float32(0)
    for i in range(w.shape[0]):
        q = min(max(np.rint(w[i] * inverse + z), np.float32(0)), top)
        e = s * (q - z) - w[i]
        error += e * e * d[i]
        qd += q * d[i]
        qqd += q * q * d[i]
        qwd += q * w[i] * d[i]
    return error, qd, qqd, qwd


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "nnan", "ninf"})
def _sums(w, d):  # pragma: no cover - compiled
    """Of one group the least and greatest weight, zero included; its weighted sum; the sum of weights `d`."""
    lo = np.float32(0)
    hi = np.float32(0)
    wd = np.float32(0)
    total = np.float32(0)
    for i in range(w.shape[0]):
        lo = min(lo, w[i])
        hi = max(hi, w[i])
        wd += w[i] * d[i]
        total += d[i]
    return lo, hi, wd, total


@numba.njit(cache=True, nogil=True)
def _stored(s, digits):  # pragma: no cover - compiled
    """The nearest scale with `digits` significant binary digits that is not too small to store."""
    if abs(s) < np.float32(SMALLEST_SCALE):
        return np.float32(-SMALLEST_SCALE) if s < 0 else np.float32(SMALLEST_SCALE)
    # Veltkamp's splitting; it needs exact IEEE order, so no fast maths here.
    c = np.float32(np.float32(2.0 ** (24 - digits) + 1.0) * s)
    return np.float32(c - np.float32(c - s))


@numba.njit(cache=True, nogil=True)
def sweep_block(  # pragma: no cover - compiled
    N, d, width, top, symmetric, digits, steps, W, V, codes, scale, zero, E
):
    """Quantize a block of columns of every row.

    W holds the weights, V the same as corrected for all columns before the block; V is used up.
    E receives W less what the codes stand for.
    """
    limit = np.float32(top)
    for r in range(W.shape[0]):
        s, z, inverse = np.float32(0), np.float32(0), np.float32(0)
        for i in range(W.shape[1]):
            if i % width == 0:
                k = i // width
                s, z = fit_group(V[r, i : i + width], d[i : i + width], top, symmetric, digits, steps)
                scale[r, k] = s
                zero[r, k] = z
                inverse = np.float32(1) / s
            q = min(max(np.rint(V[r, i] * inverse + z), np.float32(0)), limit)
            codes[r, i] = np.uint8(q)
            w = s * (q - z)
            E[r, i] = W[r, i] - w
            _subtract(V[r, i + 1 :], N[i, i + 1 :], V[r, i] - w)


@numba.njit(cache=True, nogil=True, fastmath={"contract", "nsz"})
def _subtract(v, n, e):  # pragma: no cover - compiled
    """v -= e * n."""
    for j in range(v.shape[0]):
        v[j] -= e * n[j]
