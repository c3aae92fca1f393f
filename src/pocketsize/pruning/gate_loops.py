"""The compiled loops of gates: products of one token that read the weights of what takes part, and no others.

Decoding is bound by the bytes that are read; both loops read whole rows, one after the other, so that what
is left out is not read at all.
"""

# pyright: basic
from __future__ import annotations

import numba
import numpy as np

_SUMS = {"contract", "reassoc", "nsz"}


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def gated_rows(x, t, f, W, y):  # pragma: no cover - compiled
    """Add to y what the rows of W give for each x_i with |x_i| f beyond its threshold; how many those are."""
    picked = np.empty(len(x), np.int64)
    n = 0
    for i in range(len(x)):
        if abs(x[i]) * f > t[i]:
            picked[n] = i
            n += 1
    # Four rows together: y is loaded and stored a quarter as often.
    for k in range(0, n - 3, 4):
        a, b, c, d = picked[k], picked[k + 1], picked[k + 2], picked[k + 3]
        xa, xb, xc, xd = x[a], x[b], x[c], x[d]
        A, B, C, D = W[a], W[b], W[c], W[d]
        for j in range(len(y)):
            y[j] += xa * A[j] + xb * B[j] + xc * C[j] + xd * D[j]
    for k in range(n - n % 4, n):
        a = picked[k]
        xa, A = x[a], W[a]
        for j in range(len(y)):
            y[j] += xa * A[j]
    return n


@numba.njit(cache=True, nogil=True, fastmath=_SUMS)
def gated_channels(a, t, x, U, bias, D, y):  # pragma: no cover - compiled
    """Add to y what the channels with |a_i| beyond their threshold give: a_i (U_i x + bias_i) D_i."""
    n = 0
    for i in range(len(a)):
        if abs(a[i]) > t[i]:
            n += 1
            row, total = U[i], bias[i]
            for j in range(len(x)):
                total += row[j] * x[j]
            h, out = a[i] * total, D[i]
            for j in range(len(y)):
                y[j] += h * out[j]
    return n
