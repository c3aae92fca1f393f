"""The compiled loops of codebooks: the scale search of a group, and the column sweep of GPTQ.

Like those of the uniform grid in `compiled`, all in one file with whatever they call, since numba's cache
looks at the file of the function it compiled alone.
"""

# pyright: basic
from __future__ import annotations

import numba
import numpy as np

from pocketsize.quantization.codebook import (
    E4M3,
    E4M3_DIGITS,
    E4M3_LEAST,
    E4M3_MOST,
    E4M3_NORMAL,
    E8M0,
    FLOAT,
    LEAST,
)
from pocketsize.quantization.compiled import HOPELESS, INNER, LANES, ROUNDS, SHRINK, STEPS

# Powers of two that are tried: the least that holds the largest weight, and those below it.
POWERS = 4
# Starts from the mean magnitude grow by so much of it, from one step below.
GROWTH = 0.2
_LEAST_HALF, _LEAST_FLOAT, _LEAST_POWER = LEAST["half"], LEAST["float"], LEAST["e8m0"]


@numba.njit(cache=True, nogil=True)
def fit_rows(W, d, width, values, middles, how, scale):  # pragma: no cover - compiled
    """Fill `scale` for all groups of the rows of W; `how` is that of `fit_group`."""
    for r in range(W.shape[0]):
        for k in range(W.shape[1] // width):
            a = k * width
            scale[r, k] = fit_group(W[r, a : a + width], d[a : a + width], values, middles, how)


@numba.njit(**INNER)
def fit_group(w, d, values, middles, how):  # pragma: no cover - compiled
    """The scale of one group.

    `how`: the magnitudes of the table's ends, whether a start is the mean magnitude, whether scales may be
    negative, how they are stored, their digits, their unit, and whether they are searched.
    """
    left, right, by_mean, signed, kind, digits, unit, searched = how
    lo, hi, mean = _size(w)
    best = np.float32(np.inf)
    s_best = np.float32(0)
    for k in range(_starts(kind, searched)):
        for sign in range(2 if signed else 1):
            end = max(-lo / right, hi / left) if sign else max(-lo / left, hi / right)
            start = _start(k, end, mean, by_mean, kind, searched)
            s = _stored(-start if sign else start, kind, digits, unit)
            for turn in range(ROUNDS + 1 if searched else 1):
                error, tt, tw = _moments(w, d, s, values, middles)
                hopeless = error > HOPELESS * best
                if error < best:
                    best, s_best = error, s
                if turn == ROUNDS or not searched or hopeless or tt <= 0:
                    break
                s_next = _stored(tw / tt, kind, digits, unit)
                if s_next == s:
                    break
                s = s_next
    return s_best


@numba.njit(**INNER)
def _starts(kind, searched):  # pragma: no cover - compiled
    """How many scales a search begins from; a plain power of two is the better of the two nearest."""
    if kind == E8M0:
        return POWERS if searched else 2
    return STEPS + 1 if searched else 1


@numba.njit(**INNER)
def _start(k, end, mean, by_mean, kind, searched):  # pragma: no cover - compiled
    """The start number k: from `end`, the least scale at which the table spans the group, down."""
    if by_mean:
        return np.float32(mean * (1.0 + GROWTH * (k - 1))) if searched else mean
    if kind == E8M0:
        power = np.ceil(np.log2(end)) if end > 0 else np.float32(-126)
        return np.float32(2.0 ** max(power - k, -126.0))
    return np.float32(end * (1.0 - SHRINK * k))


@numba.njit(**INNER)
def _stored(s, kind, digits, unit):  # pragma: no cover - compiled
    """The nearest scale that can be stored, none zero."""
    size = abs(s)
    if kind == E4M3:
        size = size / unit
        if size < np.float32(E4M3_NORMAL):
            size = max(np.rint(size * np.float32(2.0**9)) * np.float32(2.0**-9), np.float32(E4M3_LEAST))
        size = min(_rounded(size, E4M3_DIGITS), np.float32(E4M3_MOST)) * unit
    elif kind == E8M0:
        size = max(size, np.float32(_LEAST_POWER))
        power = np.float32(2.0 ** np.floor(np.log2(size)))
        size = power * np.float32(2) if size > np.float32(1.5) * power else power
    elif kind == FLOAT:
        size = max(size, np.float32(_LEAST_FLOAT))
    else:
        size = max(_rounded(size, digits), np.float32(_LEAST_HALF))
    return np.float32(-size) if s < 0 else np.float32(size)


@numba.njit(**INNER)
def _rounded(x, digits):  # pragma: no cover - compiled
    """The nearest number with so many significant binary digits, as `compiled` rounds it: no fast maths."""
    c = np.float32(np.float32(2.0 ** (24 - digits) + 1.0) * x)
    return np.float32(c - np.float32(c - x))


@numba.njit(**INNER, fastmath={"reassoc", "nsz", "contract", "nnan", "ninf"})
def _moments(w, d, s, values, middles):  # pragma: no cover - compiled
    """Weighted error of a scale on one group, and the moments that its least-squares update needs."""
    inverse = np.float32(1) / s
    error = np.float32(0)
    tt = np.float32(0)
    tw = np.float32(0)
    for i in range(np.uint64(w.shape[0])):
        x = w[i] * inverse
        value = values[0]
        for k in range(np.uint64(15)):
            value = values[k + np.uint64(1)] if x > middles[k] else value
        e = s * value - w[i]
        error += e * e * d[i]
        tt += value * value * d[i]
        tw += value * w[i] * d[i]
    return error, tt, tw


@numba.njit(**INNER, fastmath={"reassoc", "nsz", "nnan", "ninf"})
def _size(w):  # pragma: no cover - compiled
    """The range of a group, with 0, and its mean magnitude."""
    lo = hi = total = np.float32(0)
    for i in range(w.shape[0]):
        lo = w[i] if w[i] < lo else lo
        hi = w[i] if w[i] > hi else hi
        total += abs(w[i])
    return lo, hi, total / np.float32(w.shape[0])


@numba.njit(cache=True, nogil=True)
def sweep_block(  # pragma: no cover - compiled
    N, d, width, values, middles, how, p, W, V, codes, scale, E, v, group
):
    """Quantize a block of inputs of as many outputs as V has, from p on, as `compiled.sweep_block` does."""
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
                scale[k, first + t] = fit_group(group, d[a : a + width], values, middles, how)
            for i in range(a, a + width):
                _round(i, first, count, values, middles, scale[k], W, codes, E, v)
                _absorb(i, count, N, v)


@numba.njit(**INNER, error_model="numpy")
def _round(i, first, count, values, middles, scale, W, codes, E, v):  # pragma: no cover - compiled
    """Codes of an input; what they leave of its corrected weights stays in v[i]."""
    for t in range(np.uint64(count)):  # unsigned, or each index would be checked and nothing vectorised
        r = np.uint64(first) + t
        s = scale[r]
        x = v[i, t] * (np.float32(1) / s)
        code, value = np.float32(0), values[0]
        for k in range(np.uint64(15)):
            above = x > middles[k]
            code = np.float32(k + np.uint64(1)) if above else code
            value = values[k + np.uint64(1)] if above else value
        codes[i, r] = np.uint8(code)
        E[i, r] = W[i, r] - s * value
        v[i, t] -= s * value


@numba.njit(**INNER, fastmath={"contract", "nsz"})
def _absorb(i, count, N, v):  # pragma: no cover - compiled
    """Later inputs absorb the error of input i."""
    for j in range(np.uint64(i + 1), np.uint64(v.shape[0])):
        n = N[i, j]
        for t in range(np.uint64(count)):
            v[j, t] -= v[i, t] * n
