"""Learned rounding: codes, scales and free zeros that follow the gradient of what a whole block gives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pocketsize.quantization.codebook_grid import places, storable
from pocketsize.quantization.grid import QWeight, storable_scale, storable_zero

# How near to the edge of its cell a weight begins at most.
INSIDE = 0.49
# How far a weight moves in all where every gradient agrees, in codes; in fewer steps than these it moves no
# faster. How fast scales and zeros move at first, in scales.
TRAVEL, STEPS, PACE = 0.05, 50, 1e-3
# How long directions and sizes of gradients are remembered.
_DIRECTION, _CODE_SIZE, _GRID_SIZE = 0.9, 0.95, 0.99


class Learned:
    """A quantized matrix while it is learned.

    Each weight has a place on the axis of its codes, `codes` being the nearest whole ones: it begins where
    the original weight lies, but no further than `INSIDE` from the code that it has. `update` moves
    places, scales and, with float zeros, the values of code 0 (in super-blocks places alone) against the
    gradient of a loss by the matrix, straight through the rounding; `matrix` is always what would be stored.

        place <- place - rate * direction,    rate falling from 2 TRAVEL / max(steps, STEPS) to 0

    Rounding that is learned block by block: AdaRound (arXiv:2004.10568), BRECQ (arXiv:2102.05426); by
    straight-through signs of gradients within the cell of the rounding: SignRound (arXiv:2309.05516).
    Here directions are Adam's (arXiv:1412.6980): where gradients of batches disagree nothing moves, and
    codes of a good solver are left. On a codebook places run evenly between the middles of its entries, and
    scales that are powers of two stay.
    """

    def __init__(self, W: Float[Tensor, "out in"], weight: QWeight) -> None:
        self._start = weight
        codes = self._grouped(weight.codes.to(torch.float32))
        where = self._grouped(W.to(torch.float32)) / weight.scale[..., None] + weight.zero[..., None]
        self._values: Tensor | None = None
        if (table := weight.scheme.table) is not None:
            self._values = table.tensor(W.device)
            where = places(where, self._grouped(weight.codes), table)
        self._place = codes + (where - codes).nan_to_num(0).clamp(-INSIDE, INSIDE)
        # Scales of a super-block are whole multiples of what they share: they stay.
        count = 0 if weight.scheme.super_blocks else 1 + weight.scheme.float_zeros
        self._moved = [torch.zeros_like(weight.scale) for _ in range(count)]
        self._of_place = _Adam(_CODE_SIZE)
        self._of_grid = [_Adam(_GRID_SIZE) for _ in self._moved]

    def _grouped(self, T: Tensor) -> Float[Tensor, "out groups g"]:
        return T.view(*self._start.scale.shape, -1)

    @property
    def codes(self) -> UInt8[Tensor, "out in"]:
        """The codes as they are now."""
        codes = self._place.round().clamp(0, self._start.scheme.top)
        return codes.to(torch.uint8).view(self._start.codes.shape)

    def weight(self) -> QWeight:
        """The matrix as it would be stored now."""
        start, scheme = self._start, self._start.scheme
        if scheme.super_blocks:
            return replace(start, codes=self.codes)
        grown, zero = start.scale * (1 + self._moved[0]), start.zero
        if scheme.table is not None:
            return QWeight(self.codes, storable(grown, start.scale, scheme), zero, scheme)
        scale = storable_scale(grown, scheme.scale_digits)
        if scheme.float_zeros:
            zero = storable_zero(-(start.minimum + start.scale * self._moved[1]) / scale, scale, scheme)
        return QWeight(self.codes, scale, zero, scheme)

    def update(self, gradient: Float[Tensor, "out in"], step: int, steps: int) -> None:
        """Move against the gradient of the loss by the matrix, as step number `step` of `steps`."""
        g, scale = self._grouped(gradient.to(torch.float32)), self._start.scale
        left = 1 - step / steps
        codes = self._place.round().clamp_(0, self._start.scheme.top)
        if self._values is not None:
            codes = self._values[codes.int()]
        sums = g.sum(-1)
        if self._start.scheme.super_blocks:
            slopes = ()
        elif self._start.scheme.float_zeros:
            slopes = ((g * codes).sum(-1) * scale, sums * scale)
        else:
            slopes = ((g * codes).sum(-1) * scale - sums * self._start.zero * scale,)
        for moved, adam, slope in zip(self._moved, self._of_grid, slopes, strict=True):
            moved -= PACE * left * adam.direction(slope, step)
        rate = 2 * TRAVEL / max(steps, STEPS) * left
        self._place -= rate * self._of_place.direction(g * scale.sign()[..., None], step)


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
