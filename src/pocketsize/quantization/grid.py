"""The uniform grid: a stored matrix, and how its scales and zeros are chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from pocketsize.errors import UnsupportedError
from pocketsize.quantization.codebook import LEAST, digits_of, unit_within
from pocketsize.quantization.codebook_grid import fit_scales, nearest
from pocketsize.quantization.compiled import SMALLEST_SCALE, STEPS, fit_rows
from pocketsize.quantization.rows import over_rows
from pocketsize.quantization.scheme import SUPER_BLOCK, Scheme
from pocketsize.quantization.superblock_loops import fit_super_rows


@dataclass(frozen=True, slots=True)
class QWeight:
    """A quantized matrix: codes on a per-group affine grid, W ~ scale * (codes - zero), or of a table.

    `scale` (float32) holds values that bfloat16 and float16 both store exactly and may be
    negative on a symmetric grid; `zero` (float32) holds whole numbers within 0 .. 2^bits - 1 or,
    with float zeros, whatever makes the value of code 0 a float16. In super-blocks scales, and values of
    code 0, are whole multiples of a float16 (`multiples`), exact in float32. With a codebook
    W ~ scale * table[codes], `scale` is what its scheme stores exactly, and `zero` is 0. Codes that are
    floats are so by their bits, with 0 for a zero.
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
        if (
            self.scheme.super_blocks
        ):  # 11 digits of a float16, times 6: all the product has, less its rounding
            return digits_of(least, 17)
        return least.to(torch.float16).to(torch.float32) if self.scheme.float_zeros else least

    def divided(self, by: Float[Tensor, "out"]) -> QWeight:
        """The matrix whose outputs are divided by these powers of two, which loses nothing up to `most`."""
        return replace(self, scale=self.scale / by[:, None])

    @property
    def most(self) -> Float[Tensor, "out"]:
        """The largest power of two by which each output can be divided and still be stored exactly."""
        if self.scheme.super_blocks:
            units = [unit for unit, _ in multiples(self)]
            return torch.cat([_last_place(unit) for unit in units], dim=1).amin(1)
        smallest, table = SMALLEST_SCALE, self.scheme.table
        if table is not None and table.scales == "e4m3":
            # What is multiplied, by 2^6 at most (`awq.LIMIT`), raises the unit of all by as much, and 2^-6 of
            # a unit is the least scale that has all digits.
            smallest = unit_within(self.scale)
        elif table is not None:
            smallest = LEAST[table.scales]
        room = torch.exp2(torch.log2(self.scale.abs() / smallest).floor()).amin(1)
        if not self.scheme.float_zeros:
            return room
        return torch.minimum(room, _last_place(self.minimum).amin(1))

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The matrix the codes stand for, float32."""
        out, columns = self.codes.shape
        if (table := self.scheme.table) is not None:
            values = table.tensor(self.codes.device)[self.codes.int()].view(out, self.scale.shape[1], -1)
            return (self.scale[..., None] * values).view(out, columns)
        codes = self.codes.view(torch.float8_e4m3fn) if self.scheme.floats else self.codes
        grouped = codes.view(out, self.scale.shape[1], -1).float()
        if self.scheme.float_zeros:
            return (self.scale[..., None] * grouped + self.minimum[..., None]).view(out, columns)
        return (self.scale[..., None] * (grouped - self.zero[..., None])).view(out, columns)


def _last_place(values: Float[Tensor, "out n"]) -> Float[Tensor, "out n"]:
    """The largest power of two by which each value can be divided and still be a float16."""
    last = (values * 2.0**24).to(torch.int64)  # float16 has no digits below 2^-24
    return torch.where(last == 0, 2**40, last & -last).to(torch.float32)


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
    arXiv:2505.17595. In a super-block each group is fitted so by itself first; then the float16 of which
    scales are multiples is chosen by the curvature of each group's error, another for the values of code 0;
    then each group is fitted again among multiples. For codebooks see `fit_scales`; their zeros are 0.
    """
    if scheme.table is not None:
        scale = fit_scales(W, scheme, weight)
        return scale, torch.zeros_like(scale)
    width = scheme.width(W.shape[1])
    if scheme.super_blocks:
        ones = torch.ones(W.shape[1], device=W.device)
        return _fit_super_blocks(W, scheme, *((ones, 0) if weight is None else (weight, STEPS)))
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


def _fit_super_blocks(
    W: Float[Tensor, "out in"], scheme: Scheme, weight: Float[Tensor, "in"], steps: int
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Scale and zero of every group, in `steps` shrunk ranges; with none each range whole."""
    rows, d = (T.to("cpu", torch.float32).contiguous().numpy() for T in (W, weight))
    width = scheme.width(W.shape[1])
    scale, zero = np.empty((2, len(rows), W.shape[1] // width), np.float32)

    def fit(a: int, b: int) -> None:
        grid = (width, scheme.top, scheme.grid, steps, scheme.top_scale)
        fit_super_rows(rows[a:b], d, *grid, scale[a:b], zero[a:b])

    over_rows(len(rows), fit)
    return torch.from_numpy(scale).to(W.device), torch.from_numpy(zero).to(W.device)


def multiples(weight: QWeight) -> list[tuple[Float[Tensor, "out blocks"], Int64[Tensor, "out groups"]]]:
    """What a super-block matrix is stored as: of scales, and of minus the values of code 0 where there are
    any, the float16 that each super-block has and how many times each group takes it.

    That float16 is the largest of which all values are multiples; which one was meant does not matter.
    """
    per = SUPER_BLOCK // (weight.codes.shape[1] // weight.scale.shape[1])
    kinds = [weight.scale] + [-weight.minimum] * weight.scheme.float_zeros
    return [_common_unit(values, per, weight.scheme.top_scale) for values in kinds]


def _common_unit(
    values: Float[Tensor, "out groups"], per: int, most: int
) -> tuple[Float[Tensor, "out blocks"], Int64[Tensor, "out groups"]]:
    """The largest float16 of which `per` values are multiples each, up to `most`; 0 where all are 0."""
    whole = (values.to(torch.float64) * 2.0**24).to(torch.int64).view(len(values), -1, per)
    divisor = torch.from_numpy(np.gcd.reduce(whole.cpu().numpy(), axis=-1)).to(values.device)
    unit = torch.zeros_like(divisor)
    for j in range(most, 0, -1):  # the smallest that will do comes last
        part = divisor // j
        fits = (part * j == divisor) & (part * 2.0**-24).to(torch.float16).to(torch.float64).mul(2.0**24).eq(
            part
        )
        unit = torch.where(fits, part, unit)
    count = whole // unit.clamp(min=1)[..., None]
    if bool((count.abs() > most).any()) or bool((count * unit[..., None] != whole).any()):
        raise UnsupportedError(f"scales of a super-block are no multiples, up to {most}, of any float16")
    return (unit * 2.0**-24).to(torch.float32), count.view_as(values)


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
    least = torch.full_like(scale, SMALLEST_SCALE).copysign(scale)
    return torch.where(scale.abs() < SMALLEST_SCALE, least, digits_of(scale, digits))


def encode(
    W: Float[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"],
    scheme: Scheme,
) -> UInt8[Tensor, "out in"]:
    """The nearest code of every weight, on a uniform grid or in a codebook."""
    return snap(W, scale, zero, scheme.top) if scheme.table is None else nearest(W, scale, scheme.table)


def snap(
    W: Float[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"],
    top: int,
) -> UInt8[Tensor, "out in"]:
    """The nearest code of every weight on a uniform grid."""
    out, groups = scale.shape
    w = W.to(torch.float32).reshape(out, groups, -1)
    codes = (w * (1 / scale)[..., None] + zero[..., None]).round().clamp(0, top)
    return codes.to(torch.uint8).reshape(W.shape)
