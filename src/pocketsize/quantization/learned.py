"""Learned rounding: codes, scales and free zeros that follow the gradient of what a whole block gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pocketsize.quantization.codebook_grid import beside, places, storable
from pocketsize.quantization.grid import QWeight, storable_scale, storable_zero
from pocketsize.quantization.scheme import Scheme

# How near to the edge of its cell a weight begins at most.
INSIDE = 0.49
# How far a weight moves in all where every gradient agrees, in codes; in fewer steps than these it moves no
# faster. How fast scales and zeros move at first, in scales.
TRAVEL, STEPS, PACE = 0.05, 50, 1e-3
# Widths at which places begin soft, how soft, and the share of steps after which they are hard.
SOFT_BITS, SOFT, HARD = 2, 0.5, 0.75
# How long directions and sizes of gradients are remembered.
_DIRECTION, _CODE_SIZE, _GRID_SIZE = 0.9, 0.95, 0.99


class Learned:
    """A quantized matrix while it is learned.

    Each weight has a place on the axis of its codes, `codes` being the nearest whole ones: it begins where
    the original weight lies, but no further than `INSIDE` from the code that it has. `update` moves
    places, scales and, with float zeros, the values of code 0 (in super-blocks places alone) against the
    gradient of a loss by the matrix, straight through the rounding; `matrix` is always what would be stored.

        place <- place - rate * direction,    rate falling from 2 TRAVEL / max(steps, STEPS) to 0

    In few bits (`hardens`) what a block is given while it learns is `soft`: at first halfway between codes
    and the original weights, as far as these lie in the cells, then ever nearer to the codes, and codes alone
    when `HARD` of the steps are made. The more weights are settled, the more the others make up for them
    (progressive hardening: TesseraQ, arXiv:2410.19103, which settles the surest weights first).

    Rounding that is learned block by block: AdaRound (arXiv:2004.10568), BRECQ (arXiv:2102.05426); by
    straight-through signs of gradients within the cell of the rounding: SignRound (arXiv:2309.05516).
    Here directions are Adam's (arXiv:1412.6980): where gradients of batches disagree nothing moves, and
    codes of a good solver are left. On a codebook places run evenly between the middles of its entries, and
    scales that are powers of two stay.
    """

    def __init__(self, W: Float[Tensor, "out in"], weight: QWeight) -> None:
        self._start = weight
        self._place = places_of(W, weight)
        self._moved = still(weight)
        self._of_place = _Adam(_CODE_SIZE)
        self._of_grid = [_Adam(_GRID_SIZE) for _ in self._moved]

    @property
    def codes(self) -> UInt8[Tensor, "out in"]:
        """The codes as they are now."""
        return codes_at(self._place, self._start)

    def weight(self) -> QWeight:
        """The matrix as it would be stored now."""
        return regrown(self._start, self.codes, self._moved)

    def soft(self, share: float) -> Float[Tensor, "out in"]:
        """The matrix with each place drawn to its code but for this share of what it lies off.

            s (code + share (place - code) - z),     a place at most half a cell from its code

        With 0 it is what would be stored. On a codebook half a cell is half the way to the next entry.
        """
        stored = self.weight()
        Q = stored.dequantize()
        if not share:
            return Q
        codes = stored.codes.view(self._place.shape)
        off = (self._place - codes.to(torch.float32)).clamp(-0.5, 0.5)
        if (table := stored.scheme.table) is not None:
            off = beside(off, codes, table)
        return Q + (share * stored.scale[..., None] * off).view(Q.shape)

    def update(self, gradient: Float[Tensor, "out in"], step: int, steps: int) -> None:
        """Move against the gradient of the loss by the matrix, as step number `step` of `steps`."""
        start = self._start
        g, left = gradient.to(torch.float32).view(*start.scale.shape, -1), 1 - step / steps
        slopes = grid_slopes(start, self.codes, g)
        for moved, adam, slope in zip(self._moved, self._of_grid, slopes, strict=True):
            moved -= PACE * left * adam.direction(slope, step)
        rate = 2 * TRAVEL / max(steps, STEPS) * left
        self._place -= rate * self._of_place.direction(g * start.scale.sign()[..., None], step)


def softness(step: int, steps: int) -> float:
    """How soft places are at a step: `SOFT` at first, falling evenly to 0 after `HARD` of the steps."""
    return SOFT * max(0.0, 1.0 - step / (HARD * steps))


def hardens(scheme: Scheme) -> bool:
    """Whether places begin soft: with so few codes most weights lie far from theirs."""
    return scheme.bits <= SOFT_BITS


def places_of(W: Float[Tensor, "out in"], weight: QWeight) -> Float[Tensor, "out groups g"]:
    """Where original weights lie on the axis of the codes, but no further than `INSIDE` from their codes."""
    grouped = (*weight.scale.shape, -1)
    codes = weight.codes.to(torch.float32).view(grouped)
    where = W.to(torch.float32).reshape(grouped) / weight.scale[..., None] + weight.zero[..., None]
    if (table := weight.scheme.table) is not None:
        where = places(where, weight.codes.view(grouped), table)
    return codes + (where - codes).nan_to_num(0).clamp(-INSIDE, INSIDE)


def still(weight: QWeight) -> list[Float[Tensor, "out groups"]]:
    """How far scales, and values of code 0 where they are free, have moved at first, in scales.

    Scales of a super-block are whole multiples of what they share: they stay.
    """
    count = 0 if weight.scheme.super_blocks else 1 + weight.scheme.float_zeros
    return [torch.zeros_like(weight.scale) for _ in range(count)]


def scales_move(scheme: Scheme) -> bool:
    """Whether scales can follow a gradient: not where they share a unit, nor where they are powers of two."""
    return not scheme.super_blocks and (scheme.table is None or scheme.table.scales != "e8m0")


def codes_at(place: Float[Tensor, "out groups g"], start: QWeight) -> UInt8[Tensor, "out in"]:
    """The nearest codes of places."""
    return place.round().clamp(0, start.scheme.top).to(torch.uint8).view(start.codes.shape)


def regrown(
    start: QWeight, codes: UInt8[Tensor, "out in"], moved: Sequence[Float[Tensor, "out groups"]]
) -> QWeight:
    """The matrix with these codes, its scales and free zeros moved so far from the start, as it is stored."""
    scheme, zero = start.scheme, start.zero
    if not moved:
        return replace(start, codes=codes)
    grown = start.scale * (1 + moved[0])
    if scheme.table is not None:
        return QWeight(codes, storable(grown, start.scale, scheme), zero, scheme)
    scale = storable_scale(grown, scheme.scale_digits)
    if scheme.float_zeros:
        zero = storable_zero(-(start.minimum + start.scale * moved[1]) / scale, scale, scheme)
    return QWeight(codes, scale, zero, scheme)


def grid_slopes(
    start: QWeight, codes: UInt8[Tensor, "out in"], g: Float[Tensor, "out groups g"]
) -> tuple[Float[Tensor, "out groups"], ...]:
    """The gradients for what `still` gives, from that for the matrix with these codes."""
    scheme, scale = start.scheme, start.scale
    if scheme.super_blocks:
        return ()
    table = scheme.table
    values = codes.to(g.dtype) if table is None else table.tensor(g.device)[codes.int()]
    values = values.view(g.shape)
    sums = g.sum(-1)
    if scheme.float_zeros:
        return (g * values).sum(-1) * scale, sums * scale
    return ((g * values).sum(-1) * scale - sums * start.zero * scale,)


@dataclass(slots=True)
class _Adam:
    """Which way to go: the mean gradient over its mean size."""

    size: float
    mean: Tensor | None = None
    square: Tensor | None = None

    def direction(self, gradient: Tensor, step: int) -> Tensor:
        """The direction after one more gradient, number `step`."""
        if self.mean is None or self.square is None:
            self.mean, self.square = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self.mean.lerp_(gradient, 1 - _DIRECTION)
        self.square.lerp_(gradient * gradient, 1 - self.size)
        size = (self.square / (1 - self.size ** (step + 1))).sqrt_()
        return (self.mean / (1 - _DIRECTION ** (step + 1))).div_(size + 1e-20)
