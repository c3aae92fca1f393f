"""SmoothQuant: what makes inputs hard to round is moved into weights, which are easy to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pocketsize.quantization.activations import rounded
from pocketsize.quantization.factors import best_factors, powers_of_two
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme

EXPONENTS = 10
# Scales are tried on so many outputs, evenly spaced.
ROWS = 128
# No scale is larger than 2^8, or smaller than its inverse.
LIMIT = 8
_FAINT = 1e-5


def smooth_scales(
    W: Float[Tensor, "out in"],
    X: Float[Tensor, "t in"],
    held: Float[Tensor, "h in"],
    peak: Float[Tensor, "in"],
    scheme: Scheme,
    *,
    feeds: Int64[Tensor, "in"],
    most: Float[Tensor, "fed"],
    exponents: int = EXPONENTS,
) -> Float[Tensor, "fed"] | None:
    """A power of two for each output of the layer before, by which inputs of W are divided.

        minimise over a:   sum_t |W x_t - Q(W s) R(x_t / s)|^2
        s = x^a / w^(1 - a),   x_j = max_t |x_tj| (`peak`),   w_j = max_i |W_ij|

    arXiv:2211.10438, where one a is chosen for a whole model; here each matrix has its own. Q rounds weights
    to nearest, R a token as it will be rounded in use. `feeds` says which output of the layer before each
    input is: several may be one (grouped-query attention), and share its scale in the search already. `most`
    is the largest scale that each output can be divided by. Scales are powers of two, as AWQ's are. None
    where no scale loses less than 1 on text that did not choose it (`held`).
    """
    pick = torch.linspace(0, len(W) - 1, min(len(W), ROWS)).round().long().to(W.device)
    sample = W[pick].to(torch.float32)
    one = torch.ones_like(most)
    return best_factors(
        candidates(W, peak, feeds, most, exponents),
        one,
        lambda s: smoothed_loss(sample, X, s[feeds], scheme),
        lambda s: smoothed_loss(sample, held, s[feeds], scheme, X),
    )


def candidates(
    W: Float[Tensor, "out in"],
    peak: Float[Tensor, "in"],
    feeds: Int64[Tensor, "in"],
    most: Float[Tensor, "fed"],
    exponents: int,
) -> Iterator[Float[Tensor, "fed"]]:
    """The scales by rising exponent; of inputs that are one output the largest counts."""
    x, w = (_largest(v, feeds, most) for v in (peak, W.abs().amax(0)))
    x, w = x.clamp(min=_FAINT * float(x.max())), w.clamp(min=_FAINT * float(w.max()))
    for k in range(exponents + 1):
        a = k / exponents
        s = x**a / w ** (1 - a)
        yield powers_of_two(s, most, LIMIT)


def smoothed_loss(
    W: Float[Tensor, "out in"],
    X: Float[Tensor, "t in"],
    s: Float[Tensor, "in"],
    scheme: Scheme,
    seen: Float[Tensor, "u in"] | None = None,
) -> float:
    """The squared error of outputs on the tokens X, whose inputs are divided by s and rounded.

    The grid of the weights is searched for the tokens `seen`, else X.
    """
    importance = (X if seen is None else seen).square().mean(0) / s**2
    Q = rtn(W * s, scheme, weight=importance).dequantize()
    E = rounded(X / s, floats=scheme.floats) @ Q.T - X @ W.T
    return float(E.square().sum(dtype=torch.float64))


def _largest(
    values: Float[Tensor, "in"], feeds: Int64[Tensor, "in"], like: Float[Tensor, "fed"]
) -> Float[Tensor, "fed"]:
    """The largest over the inputs that are one output of the layer before."""
    return torch.zeros_like(like).scatter_reduce(0, feeds, values.to(like.dtype), "amax")
