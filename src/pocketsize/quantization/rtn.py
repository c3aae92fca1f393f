"""Round to nearest: no data, no search; the floor every other method is held against."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from pocketsize.quantization.floats import round_floats
from pocketsize.quantization.grid import QWeight, encode, fit_grid
from pocketsize.quantization.scheme import Scheme


def rtn(W: Float[Tensor, "out in"], scheme: Scheme, *, weight: Float[Tensor, "in"] | None = None) -> QWeight:
    """Quantize every weight to the nearest point of its group's grid.

    With `weight` (the importance of each input, for instance the diagonal of its Gram matrix)
    scale and zero are searched to minimise the weighted error; without it they span the range.
    With a codebook the point is the nearest entry of its table. W is left untouched.
    """
    if scheme.floats:
        return round_floats(W, scheme, weight)
    scale, zero = fit_grid(W, scheme, weight)
    return QWeight(encode(W, scale, zero, scheme), scale, zero, scheme)
