"""Straight-through rounding: forward the weights are on their grid, backward as if they were not rounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from pocketsize.quantization.codebook_grid import nearest
from pocketsize.quantization.grid import QWeight, storable_scale
from pocketsize.quantization.learned import codes_at, grid_slopes, regrown
from pocketsize.quantization.scheme import NAMED, Scheme

TERNARY = NAMED["TERNARY"]


def ternary(W: Float[Tensor, "out in"], scheme: Scheme = TERNARY) -> Float[Tensor, "out in"]:
    """W on a ternary grid as it is stored, with the gradient of W itself.

        Q = s clamp(round(W / s), -1, 1),   s = mean |W|,      dL/dW := dL/dQ

    BitNet b1.58 (arXiv:2402.17764), but that it has one scale for a matrix and here each group of a row has
    one (each row under `TERNARY`), rounded as it is stored: what is trained is what an export holds. On any
    device; W is left untouched.
    """
    return ternarised(W.detach(), scheme).dequantize() + (W - W.detach())


def ternarised(W: Float[Tensor, "out in"], scheme: Scheme = TERNARY) -> QWeight:
    """The ternary matrix, for what is stored when training ends."""
    table = scheme.table
    if table is None or not table.by_mean:
        raise ValueError(f"{scheme.name} is no ternary scheme")
    groups = W.to(torch.float32).view(len(W), -1, scheme.width(W.shape[1]))
    scale = storable_scale(groups.abs().mean(-1), scheme.scale_digits)
    return QWeight(nearest(W, scale, table), scale, torch.zeros_like(scale), scheme)


# How fast scales and free zeros move beside places: a relative step of theirs, for a step of one code.
GRID_RATE = 0.1


def on_grid(
    place: Float[Tensor, "out groups g"], moved: Sequence[Float[Tensor, "out groups"]], start: QWeight
) -> Float[Tensor, "out in"]:
    """The matrix at these places, as it is stored, differentiable by places and by what moved.

        Q = s (clamp(round(place), 0, top) - z),   s = s_0 (1 + GRID_RATE moved)
        dQ/dplace := s_0 between the ends of the range, 0 beyond them        (straight through)
        dQ/dmoved  = GRID_RATE s_0 (code - z)

    LSQ (arXiv:1902.08153) with places in codes instead of weights, so that one learning rate is the same
    share of a cell in every group, and codes that a solver chose are a start like any other. On a codebook
    the slope for places is that of its mean spacing. Where scales stay (`moved` empty), places alone learn.
    """
    return cast(Float[Tensor, "out in"], _OnGrid.apply(place, start, *moved))


def rescaled(moved: Sequence[Float[Tensor, "out groups"]], start: QWeight) -> Float[Tensor, "out in"]:
    """The matrix with its codes as they are and these scales and free zeros, differentiable by them.

        Q = s (code - z),   s = s_0 (1 + GRID_RATE moved / top)

    A step of one moves the outermost value of a group by a tenth of a code, in every grid. It is `on_grid`
    without places (EfficientQAT's second phase, arXiv:2407.11062): nothing as large as the matrix is kept for
    the way back but its codes, of a byte each.
    """
    return cast(Float[Tensor, "out in"], _Rescaled.apply(start, *moved))


def settled(
    place: Float[Tensor, "out groups g"] | None, moved: Sequence[Float[Tensor, "out groups"]], start: QWeight
) -> QWeight:
    """What is stored of these places, or with the codes of the start where there are none (`rescaled`)."""
    if place is None:
        return regrown(start, start.codes, [_alone(start) * m for m in moved])
    return regrown(start, codes_at(place, start), [GRID_RATE * m for m in moved])


def _alone(start: QWeight) -> float:
    """How fast scales and free zeros move where codes stay: the outermost value by a tenth of a code."""
    return GRID_RATE / start.scheme.top


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        place, start, *moved = given
        ctx.save_for_backward(place)
        ctx.start, ctx.moves = start, bool(moved)
        return settled(place, moved, start).dequantize()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (place,), start = ctx.saved_tensors, ctx.start
        g = outputs[0].reshape(place.shape)
        slopes = [GRID_RATE * T for T in grid_slopes(start, codes_at(place, start), g)] if ctx.moves else []
        inside = (place > -0.5) & (place < start.scheme.top + 0.5)
        return g * (start.scale * _spacing(start))[..., None] * inside, None, *slopes


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        start, *moved = given
        ctx.start = start
        return settled(None, moved, start).dequantize()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        start = ctx.start
        g = outputs[0].reshape(*start.scale.shape, -1)
        return None, *(_alone(start) * slope for slope in grid_slopes(start, start.codes, g))


def _spacing(start: QWeight) -> float:
    """The mean distance of neighbouring values of a grid, in scales."""
    if (table := start.scheme.table) is None:
        return 1.0
    return (max(table.values) - min(table.values)) / start.scheme.top
