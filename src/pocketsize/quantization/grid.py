"""The uniform grid: a stored matrix, and how its scales and zeros are chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pocketsize.quantization.rows import over_rows
from pocketsize.quantization.scheme import Scheme

STEPS = 32
SHRINK = 0.02
ROUNDS = 2
# Below 2^-17 a scale of 8 digits is no longer exact in float16, whose last place is 2^-24.
SMALLEST_SCALE = 2.0**-17


@dataclass(frozen=True, slots=True)
class QWeight:
    """A quantized matrix: codes on a per-group affine grid, W ~ scale * (codes - zero).

    `scale` (float32) holds values that bfloat16 and float16 both store exactly and may be
    negative on a symmetric grid; `zero` (float32) holds whole numbers within 0 .. 2^bits - 1.
    """

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]
    scheme: Scheme

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The matrix the codes stand for, float32."""
        out, columns = self.codes.shape
        grouped = self.codes.view(out, self.scale.shape[1], -1).float()
        return (self.scale[..., None] * (grouped - self.zero[..., None])).view(out, columns)


def fit_grid(
    W: Float[Tensor, "out in"], scheme: Scheme, weight: Float[Tensor, "in"] | None = None
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Scale and zero of every group of every row.

        minimise over s, z:   sum_j weight_j (s (clamp(round(w_j / s) + z) - z) - w_j)^2

    With `weight` None this is the plain range (round-to-nearest's min and max, or the largest
    magnitude on a symmetric grid). Otherwise the range is shrunk in 33 steps down to 0.36, and
    from each start scale and zero are re-solved in closed form for the codes they gave, twice;
    the best of all is kept. On a symmetric grid both signs of the scale are tried, since its
    range reaches one step further on the negative side.
    """
    columns = W.shape[1]
    width = scheme.width(columns)
    rows = W.to(torch.float32).contiguous().numpy()
    d = np.ones(columns, np.float32) if weight is None else weight.to(torch.float32).numpy().copy()
    shape = (rows.shape[0], columns // width)
    scale, zero = np.empty(shape, np.float32), np.empty(shape, np.float32)
    steps = 0 if weight is None else STEPS
    symmetric, digits = scheme.symmetric, scheme.scale_digits

    def fit(a: int, b: int) -> None:
        fit_rows(rows[a:b], d, width, scheme.top, symmetric, digits, steps, scale[a:b], zero[a:b])

    over_rows(rows.shape[0], fit)
    return torch.from_numpy(scale), torch.from_numpy(zero)


def snap(
    W: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"], zero: Float[Tensor, "out groups"], top: int
) -> UInt8[Tensor, "out in"]:
    """The nearest code of every weight."""
    out, groups = scale.shape
    w = W.to(torch.float32).reshape(out, groups, -1)
    codes = (w * (1 / scale)[..., None] + zero[..., None]).round().clamp(0, top)
    return codes.to(torch.uint8).reshape(W.shape)


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
    lo, hi = _range(w)
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
            elif steps == 0:
                # Plain symmetric rounding: both ends inside the range.
                s = _stored(abs(edge) / (middle - np.float32(1)) if sign else -edge / middle, digits)
                z = middle
            else:
                s = _stored((f if sign else -f) * edge / middle, digits)
                z = middle
            for turn in range(ROUNDS + 1 if steps else 1):
                error, qd, qqd, qwd, wd, total = _moments(w, d, s, z, np.float32(top))
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
    """Weighted error of a grid on one group, and the moments its least-squares update needs."""
    inverse = np.float32(1) / s
    error = np.float32(0)
    qd = np.float32(0)
    qqd = np.float32(0)
    qwd = np.float32(0)
    wd = np.float32(0)
    total = np.float32(0)
    for i in range(w.shape[0]):
        q = min(max(np.rint(w[i] * inverse + z), np.float32(0)), top)
        e = s * (q - z) - w[i]
        error += e * e * d[i]
        qd += q * d[i]
        qqd += q * q * d[i]
        qwd += q * w[i] * d[i]
        wd += w[i] * d[i]
        total += d[i]
    return error, qd, qqd, qwd, wd, total


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "nnan", "ninf"})
def _range(w):  # pragma: no cover - compiled
    """Least and greatest weight of a group, zero included."""
    lo = np.float32(0)
    hi = np.float32(0)
    for i in range(w.shape[0]):
        lo = min(lo, w[i])
        hi = max(hi, w[i])
    return lo, hi


@numba.njit(cache=True, nogil=True)
def _stored(s, digits):  # pragma: no cover - compiled
    """The nearest scale with `digits` significant binary digits that is not too small to store."""
    if abs(s) < np.float32(SMALLEST_SCALE):
        return np.float32(-SMALLEST_SCALE) if s < 0 else np.float32(SMALLEST_SCALE)
    # Veltkamp's splitting; it needs exact IEEE order, so no fast maths here.
    c = np.float32(np.float32(2.0 ** (24 - digits) + 1.0) * s)
    return np.float32(c - np.float32(c - s))
