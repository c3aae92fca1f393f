"""Weights as float8 (e4m3): 253 values, of which half lie between -1/8 and 1/8 of the largest."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pocketsize.linalg import Factor
from pocketsize.quantization.grid import QWeight, storable_scale
from pocketsize.quantization.scheme import Scheme

LARGEST = 448.0
# Scales beyond twice the least one repeat the same grid but for its two ends.
OCTAVE = 8
BLOCK = 64


def round_floats(
    W: Float[Tensor, "out in"], scheme: Scheme, weight: Float[Tensor, "in"] | None = None
) -> QWeight:
    """Every weight as the nearest float8 times the scale of its group; W is left untouched."""
    scale = fit_floats(W, scheme, weight)
    return QWeight(snap_floats(W, scale), scale, torch.zeros_like(scale), scheme)


def fit_floats(
    W: Float[Tensor, "out in"], scheme: Scheme, weight: Float[Tensor, "in"] | None = None
) -> Float[Tensor, "out groups"]:
    """The scale of every group of every row.

        minimise over s:   sum_j weight_j (s float8(w_j / s) - w_j)^2

    With `weight` None the group's largest magnitude is the largest float8. Otherwise that scale and seven
    larger ones within an octave are tried: beyond it the same grid comes again.
    """
    w = W.to(torch.float32).view(W.shape[0], -1, scheme.width(W.shape[1]))
    plain = _storable(w.abs().amax(-1) / LARGEST, scheme)
    if weight is None:
        return plain
    d = weight.to(torch.float32).view(w.shape[1:])
    best, least = plain, torch.full_like(plain, torch.inf)
    for k in range(OCTAVE):
        scale = _storable(plain * 2 ** (k / OCTAVE), scheme)
        error = (d * (_nearest(w / scale[..., None]) * scale[..., None] - w).square()).sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def snap_floats(W: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"]) -> UInt8[Tensor, "out in"]:
    """The bits of the nearest float8 of every weight over its scale."""
    w = W.to(torch.float32).reshape(*scale.shape, -1) / scale[..., None]
    return w.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8).reshape(W.shape)


def sweep_floats(
    W: Float[Tensor, "in out"], factor: Factor, scheme: Scheme, *, search: bool
) -> tuple[UInt8[Tensor, "in out"], Float[Tensor, "groups out"], Float[Tensor, "groups out"]]:
    """Codes, scales and zeros of a transposed W, in the order of its inputs, as GPTQ's sweep gives them.

    Scales are fitted before it, to the weights as they are: float8 keeps the relative error alike over so
    wide a range that corrections change the best scale little. They make the sweep one over blocks of any
    size, in torch alone, on any device.
    """
    columns = len(W)
    width = scheme.width(columns)
    scale = fit_floats(W.T, scheme, factor.d if search else None).T.contiguous()
    codes, E = torch.empty_like(W, dtype=torch.uint8), torch.empty_like(W)  # E: W less what codes stand for
    for a in range(0, columns, BLOCK):
        b = min(a + BLOCK, columns)
        # Where the corrections of all columns before stand, each column adds those of its own block.
        V = W[a:b] + factor.M[:a, a:b].T @ E[:a]
        for i in range(a, b):
            v = V[i - a] + factor.M[a:i, i] @ E[a:i]
            s = scale[i // width]
            q = (v / s).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            codes[i] = q.view(torch.uint8)
            E[i] = W[i] - s * q.to(torch.float32)
    return codes, scale, torch.zeros_like(scale)


def _nearest(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(torch.float32)


def _storable(scale: Float[Tensor, "*shape"], scheme: Scheme) -> Float[Tensor, "*shape"]:
    return storable_scale(scale, scheme.scale_digits)
