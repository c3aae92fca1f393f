"""AWQ: inputs that matter are made larger before rounding, and what feeds them smaller by as much."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pocketsize.quantization.factors import best_factors, powers_of_two
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme

EXPONENTS = 10
# Scales are tried on so many outputs, evenly spaced.
ROWS = 128
# No scale is larger than 2^6, or smaller than its inverse.
LIMIT = 6
_FAINT = 1e-4


def input_scales(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    held: Float[Tensor, "in in"],
    scheme: Scheme,
    *,
    feeds: Int64[Tensor, "in"],
    most: Float[Tensor, "fed"],
    exponents: int = EXPONENTS,
) -> Float[Tensor, "fed"] | None:
    """A power of two for each output of the layer before, by which inputs of W are multiplied.

        minimise over a:   tr (W - Q(W s) / s) H (W - Q(W s) / s)^T,   H = E[x x^T]
        s = x^a  or  x^a / w^(1 - a),   x = E[x_j^2]^(1/2),   w = mean_i |W_ij| / max over its group

    arXiv:2306.00978 searches the first family; the second comes from programs that followed it. Q rounds to
    the grid that is searched under diag H, so clipping is searched by output error too. `feeds` says which
    output of the layer before each input is: several inputs may be one output (grouped-query attention), and
    share its scale in the search already. `most` is the largest scale that each output can be divided by.
    Scales are rounded to powers of two: whatever the numbers are stored in, moving such a factor from one
    layer to the other changes no bit of what the two compute together. None where no scale loses less than
    1 on text that did not choose it (`held`, its E[x x^T]).
    """
    pick = torch.linspace(0, len(W) - 1, min(len(W), ROWS)).round().long().to(W.device)
    sample = W[pick].to(torch.float32)
    one = torch.ones_like(most)
    return best_factors(
        candidates(sample, H, scheme, feeds, most, exponents),
        one,
        lambda s: scaled_loss(sample, H, s[feeds], scheme),
        lambda s: scaled_loss(sample, held, s[feeds], scheme, H),
    )


def candidates(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    scheme: Scheme,
    feeds: Int64[Tensor, "in"],
    most: Float[Tensor, "fed"],
    exponents: int,
) -> Iterator[Float[Tensor, "fed"]]:
    """The scales of both families, by rising exponent."""
    groups = W.abs().view(len(W), -1, scheme.width(W.shape[1]))
    share = (groups / groups.amax(-1, keepdim=True).clamp(min=1e-30)).view_as(W).mean(0)
    x, w = _of_outputs(H.diagonal(), feeds, most).sqrt(), _of_outputs(share, feeds, most)
    x, w = x.clamp(min=_FAINT * float(x.max())), w.clamp(min=_FAINT * float(w.max()))
    for k in range(1, exponents + 1):
        a = k / exponents
        for s in (x**a, x**a / w ** (1 - a)):
            yield powers_of_two(s, most, LIMIT)


def scaled(
    W: Float[Tensor, "out in"], H: Float[Tensor, "in in"], s: Float[Tensor, "in"], scheme: Scheme
) -> Float[Tensor, "out in"]:
    """What W becomes when its inputs are multiplied by s, rounded, and divided again."""
    return rtn(W * s, scheme, weight=H.diagonal() / s**2).dequantize() / s


def scaled_loss(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "in in"],
    s: Float[Tensor, "in"],
    scheme: Scheme,
    grid: Float[Tensor, "in in"] | None = None,
) -> float:
    """What rounding with the scales s costs at the outputs; the grid is searched under `grid`, else H."""
    E = W - scaled(W, H if grid is None else grid, s, scheme)
    return float(((E @ H) * E).sum(dtype=torch.float64))


def _of_outputs(
    values: Float[Tensor, "in"], feeds: Int64[Tensor, "in"], like: Float[Tensor, "fed"]
) -> Float[Tensor, "fed"]:
    """The mean over the inputs that are one output of the layer before."""
    total, count = torch.zeros_like(like), torch.zeros_like(like)
    total.index_add_(0, feeds, values.to(like.dtype))
    count.index_add_(0, feeds, torch.ones_like(values, dtype=like.dtype))
    return total / count.clamp(min=1)
