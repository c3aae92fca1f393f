"""Movement pruning: a weight stays if training moves it away from zero, however small it is."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def score_slope(W: Float[Tensor, "out in"], gradient: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The slope of the loss by scores, from that by the matrix as it is multiplied, W * mask(S).

        dL/dS := dL/d(W * mask) * W        (straight through the mask)

    Stepping against it, scores add up -W dL/dW: they rise where a weight moves away from zero
    (arXiv:2005.07683, section 4). Masked weights have a slope as well, and may come back.
    """
    return W * gradient


def by_magnitude(W: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Scores to begin with: magnitudes, in units of the mean one of the matrix.

    From zero, as in the paper, scores are noise for as long as training has not moved weights by much, and
    the first cuts are made blindly; so they are made by magnitude, which movement then overrules.
    """
    size = W.abs()
    return size / size.mean().clamp_min(torch.finfo(size.dtype).tiny)


def above(S: Float[Tensor, "out in"], threshold: float) -> Bool[Tensor, "out in"]:
    """Where sigmoid(S) is above the threshold: soft movement pruning's mask."""
    return math.log(threshold / (1 - threshold)) < S


def penalty_slope(S: Float[Tensor, "out in"], penalty: float, matrices: int) -> Float[Tensor, "out in"]:
    """The slope by one matrix' scores of what soft movement pruning adds to the loss.

    penalty * mean over matrices of mean sigmoid(S)
    """
    share = torch.sigmoid(S)
    return (penalty / (matrices * S.numel())) * share * (1 - share)
