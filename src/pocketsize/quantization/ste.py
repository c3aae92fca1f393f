"""Straight-through rounding: forward the weights are ternary, backward it is as if they were not rounded."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pocketsize.quantization.codebook_grid import nearest
from pocketsize.quantization.grid import QWeight, storable_scale
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
