"""The uniform grid: a stored matrix, and how its scales and zeros are chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pocketsize.quantization.compiled import STEPS, fit_rows
from pocketsize.quantization.rows import over_rows
from pocketsize.quantization.scheme import Scheme


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

    With `weight` None this is the plain range (round-to-nearest's min and max, or the better of
    the two placements of the largest magnitude on a symmetric grid). Otherwise the range is shrunk
    in 9 steps down to 0.36, and from each start scale and zero are re-solved in closed form for
    the codes they gave, twice; the best of all is kept. On a symmetric grid the largest magnitude
    is placed on either end of the range, of which the lower reaches one step further; scales may
    so become negative.
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
