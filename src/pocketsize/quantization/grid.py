"""The uniform grid: a stored matrix, and how its scales and zeros are chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pocketsize.quantization.compiled import SMALLEST_SCALE, STEPS, fit_rows
from pocketsize.quantization.rows import over_rows
from pocketsize.quantization.scheme import Scheme


@dataclass(frozen=True, slots=True)
class QWeight:
    """A quantized matrix: codes on a per-group affine grid, W ~ scale * (codes - zero).

    `scale` (float32) holds values that bfloat16 and float16 both store exactly and may be
    negative on a symmetric grid; `zero` (float32) holds whole numbers within 0 .. 2^bits - 1 or,
    with float zeros, whatever makes the value of code 0 a float16.
    """

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]
    scheme: Scheme

    def to(self, device: torch.device) -> QWeight:
        """The same matrix in the memory of a device."""
        return QWeight(self.codes.to(device), self.scale.to(device), self.zero.to(device), self.scheme)

    @property
    def minimum(self) -> Float[Tensor, "out groups"]:
        """What code 0 stands for in each group: -scale * zero, with float zeros exactly as it is stored."""
        least = -self.scale * self.zero
        return least.to(torch.float16).to(torch.float32) if self.scheme.float_zeros else least

    def divided(self, by: Float[Tensor, "out"]) -> QWeight:
        """The matrix whose outputs are divided by these powers of two, which loses nothing up to `most`."""
        return replace(self, scale=self.scale / by[:, None])

    @property
    def most(self) -> Float[Tensor, "out"]:
        """The largest power of two by which each output can be divided and still be stored exactly."""
        room = torch.exp2(torch.log2(self.scale.abs() / SMALLEST_SCALE).floor()).amin(1)
        if not self.scheme.float_zeros:
            return room
        last = (self.minimum * 2.0**24).to(torch.int64)  # float16 has no digits below 2^-24
        lowest = torch.where(last == 0, 2**40, last & -last).to(torch.float32)
        return torch.minimum(room, lowest.amin(1))

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The matrix the codes stand for, float32."""
        out, columns = self.codes.shape
        grouped = self.codes.view(out, self.scale.shape[1], -1).float()
        if self.scheme.float_zeros:
            return (self.scale[..., None] * grouped + self.minimum[..., None]).view(out, columns)
        return (self.scale[..., None] * (grouped - self.zero[..., None])).view(out, columns)


def fit_grid(
    W: Float[Tensor, "out in"], scheme: Scheme, weight: Float[Tensor, "in"] | None = None
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Scale and zero of every group of every row.

        minimise over s, z:   sum_j weight_j (s (clamp(round(w_j / s) + z) - z) - w_j)^2

    With `weight` None this is the plain range (round-to-nearest's min and max, or the better of
    the two placements of the largest magnitude on a symmetric grid; 0 belongs to the range unless
    zeros are floats). Otherwise the range is shrunk in 9 steps down to 0.36, and from each start scale
    and zero are re-solved in closed form for the codes they gave, twice (with a free zero not where the
    start has 1.5 times the error of the best so far); the best of all is kept. On a symmetric grid the
    largest magnitude is placed on either end of the range, of which the lower reaches one step further;
    scales may so become negative. A zero that need not be a code, solved for under a diagonal Hessian:
    arXiv:2505.17595.
    """
    width = scheme.width(W.shape[1])
    if weight is None:
        return _range(W.to(torch.float32).view(W.shape[0], -1, width), scheme)
    rows, d = (T.to("cpu", torch.float32).contiguous().numpy() for T in (W, weight))
    shape = (rows.shape[0], rows.shape[1] // width)
    scale, zero = np.empty(shape, np.float32), np.empty(shape, np.float32)

    def fit(a: int, b: int) -> None:
        grid = (width, scheme.top, scheme.grid, scheme.scale_digits, STEPS)
        fit_rows(rows[a:b], d, *grid, scale[a:b], zero[a:b])

    over_rows(rows.shape[0], fit)
    return torch.from_numpy(scale).to(W.device), torch.from_numpy(zero).to(W.device)


def _range(
    w: Float[Tensor, "out groups g"], scheme: Scheme
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """The plain grid of each group."""
    lo, hi = w.amin(-1), w.amax(-1)
    if not scheme.float_zeros:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    if not scheme.symmetric:
        scale = storable_scale((hi - lo) / scheme.top, scheme.scale_digits)
        return scale, storable_zero(-lo / scale, scale, scheme)
    edge = torch.where(-lo >= hi, lo, hi)
    zero = torch.full_like(edge, scheme.middle)
    far = storable_scale(-edge / scheme.middle, scheme.scale_digits)
    near = storable_scale(edge.abs() / (scheme.middle - 1), scheme.scale_digits)

    def error(scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups"]:
        q = (w / scale[..., None] + scheme.middle).round().clamp(0, scheme.top)
        return ((scale[..., None] * (q - scheme.middle) - w) ** 2).sum(-1)

    return torch.where(error(near) < error(far), near, far), zero


def storable_zero(
    zero: Float[Tensor, "out groups"], scale: Float[Tensor, "out groups"], scheme: Scheme
) -> Float[Tensor, "out groups"]:
    """The nearest zeros that an asymmetric scheme stores: codes, or what makes code 0 a float16."""
    if not scheme.float_zeros:
        return zero.round().clamp(0, scheme.top)
    return -(-scale * zero).to(torch.float16).to(torch.float32) / scale


def storable_scale(scale: Float[Tensor, "out groups"], digits: int) -> Float[Tensor, "out groups"]:
    """The nearest scales with so many significant binary digits, none too small to store."""
    mantissa, exponent = torch.frexp(scale)
    rounded = torch.ldexp((mantissa * 2.0**digits).round(), exponent - digits)
    least = torch.full_like(scale, SMALLEST_SCALE).copysign(scale)
    return torch.where(scale.abs() < SMALLEST_SCALE, least, rounded)


def snap(
    W: Float[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"],
    top: int,
) -> UInt8[Tensor, "out in"]:
    """The nearest code of every weight."""
    out, groups = scale.shape
    w = W.to(torch.float32).reshape(out, groups, -1)
    codes = (w * (1 / scale)[..., None] + zero[..., None]).round().clamp(0, top)
    return codes.to(torch.uint8).reshape(W.shape)
