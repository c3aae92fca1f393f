"""A codebook's grid on a matrix: the scale of each group, and the nearest entry for each weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pocketsize.quantization.codebook import (
    LEAST,
    SCALES,
    Codebook,
    as_e4m3,
    digits_of,
    unit_of,
    unit_within,
    whole_power,
)
from pocketsize.quantization.codebook_loops import fit_rows
from pocketsize.quantization.rows import over_rows
from pocketsize.quantization.scheme import Scheme


def fit_scales(
    W: Float[Tensor, "out in"], scheme: Scheme, weight: Float[Tensor, "in"] | None = None
) -> Float[Tensor, "out groups"]:
    """The scale of every group of every row.

        minimise over s:   sum_j weight_j (s v(w_j / s) - w_j)^2,   v(x) the entry nearest to x

    With `weight` None the table spans the group's range (with either sign of the scale where it is lopsided,
    of powers of two the better of the two nearest; the mean magnitude for ternary codes). Otherwise the range
    is shrunk in 9 steps down to 0.36, or four powers of two are tried, or 9 multiples of the mean from 0.8 to
    2.4, and from each the scale is re-solved in closed form for the entries it gave, twice (not where the
    start has 1.5 times the error of the best so far); the best of all is kept.
    """
    table = scheme.table
    assert table is not None
    width = scheme.width(W.shape[1])
    rows = W.to("cpu", torch.float32).contiguous()
    d = torch.ones(rows.shape[1]) if weight is None else weight.to("cpu", torch.float32).contiguous()
    scale = np.empty((rows.shape[0], rows.shape[1] // width), np.float32)
    values, middles = (T.numpy() for T in table.padded())
    how = told(scheme, unit_of(rows, table), search=weight is not None)

    def fit(a: int, b: int) -> None:
        fit_rows(rows.numpy()[a:b], d.numpy(), width, values, middles, how, scale[a:b])

    over_rows(rows.shape[0], fit)
    return torch.from_numpy(scale).to(W.device)


def told(scheme: Scheme, unit: float, *, search: bool) -> tuple[Any, ...]:
    """What compiled loops are told of the scales (see `codebook_loops.fit_group`)."""
    table = scheme.table
    assert table is not None
    ends = np.float32(-table.values[0]), np.float32(table.values[-1])
    kind = SCALES.index(table.scales)
    return (*ends, table.by_mean, table.lopsided, kind, scheme.scale_digits, np.float32(unit), search)


def nearest(
    W: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"], table: Codebook
) -> UInt8[Tensor, "out in"]:
    """The code of the nearest entry for every weight."""
    out, groups = scale.shape
    w = W.to(torch.float32).reshape(out, groups, -1)
    return torch.bucketize(w * (1 / scale)[..., None], table.middles(W.device)).to(torch.uint8).view(W.shape)


def places(
    x: Float[Tensor, "out groups g"], codes: UInt8[Tensor, "out groups g"], table: Codebook
) -> Float[Tensor, "out groups g"]:
    """Where weights in units of their scales lie on the axis of codes: at halves the nearest entry changes.

    Each is measured in the cell of the code that it has; beyond the ends cells go on as wide as before.
    """
    c = codes.int()
    offset = x - table.tensor(x.device)[c]
    return c + 0.5 * offset / _half(offset > 0, c, table)


def beside(
    off: Float[Tensor, "out groups g"], codes: UInt8[Tensor, "out groups g"], table: Codebook
) -> Float[Tensor, "out groups g"]:
    """How far from their entries, in scales, places lie that are so far from their codes: `places` undone."""
    return 2 * off * _half(off > 0, codes.int(), table)


def _half(above: Tensor, c: Tensor, table: Codebook) -> Tensor:
    """How far it is from entries to the upper or lower end of their cells."""
    values, middles = table.tensor(c.device), table.middles(c.device)
    ends = 2 * values[[0, -1]] - middles[[0, -1]]
    edges = torch.cat((ends[:1], middles, ends[1:]))
    return torch.where(above, edges[c + 1] - values[c], values[c] - edges[c])


def storable(
    scale: Float[Tensor, "out groups"], like: Float[Tensor, "out groups"], scheme: Scheme
) -> Float[Tensor, "out groups"]:
    """The nearest scales that a scheme with a codebook stores, for a matrix whose own are about as `like`."""
    table = scheme.table
    assert table is not None
    if table.scales == "e4m3":
        return as_e4m3(scale, 2 * unit_within(like))  # so they have room to grow
    if table.scales == "e8m0":
        return whole_power(scale).clamp(min=LEAST["e8m0"])
    rounded = scale if table.scales == "float" else digits_of(scale, scheme.scale_digits)
    least = torch.full_like(scale, LEAST[table.scales]).copysign(scale)
    return torch.where(scale.abs() < least.abs(), least, rounded)
