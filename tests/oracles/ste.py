"""A matrix on its grid as a graph: torch differentiates all but the roundings, which pass it straight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pocketsize.quantization.grid import QWeight, storable_scale
from pocketsize.quantization.ste import GRID_RATE


def on_grid_slowly(place: Tensor, moved: Sequence[Tensor], start: QWeight) -> Tensor:
    """s (clamp(round(place)) - z), or s c + the value of code 0 where that is free."""
    top = start.scheme.top
    clamped = place.clamp(-0.5, top + 0.5)
    codes = clamped + (place.round().clamp(0, top) - clamped).detach()
    grown = start.scale * (1 + GRID_RATE * moved[0])
    scale = (grown + (storable_scale(grown, start.scheme.scale_digits) - grown).detach())[..., None]
    # The slope for places leaves scales as they began: what a step of one code means stays the same.
    steps = start.scale[..., None] * (codes - codes.detach())
    if not start.scheme.float_zeros:
        return (scale * (codes.detach() - start.zero[..., None]) + steps).view_as(start.codes)
    least = start.minimum + start.scale * GRID_RATE * moved[1]
    least = (least + (least.half().float() - least).detach())[..., None]
    return (scale * codes.detach() + least + steps).view_as(start.codes)
