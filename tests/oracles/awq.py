"""The scale search of AWQ on rows of text, as its objective reads: outputs before less outputs after."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketsize.quantization.awq import candidates, scaled
from pocketsize.quantization.scheme import Scheme


def loss_slow(W: Tensor, X: Tensor, s: Tensor, scheme: Scheme, seen: Tensor | None = None) -> float:
    """The mean squared error of what W makes of the rows of X; `seen` are those the grid is searched on."""
    rows = X if seen is None else seen
    Q = scaled(W, rows.T @ rows / len(rows), s, scheme)
    return float(((X.double() @ (W - Q).double().T) ** 2).sum() / len(X))


def best_slow(
    W: Tensor, X: Tensor, held: Tensor, scheme: Scheme, feeds: Tensor, most: Tensor, exponents: int
) -> Tensor | None:
    """The scales with the least error on X, if they beat none on what is held out."""
    one = torch.ones_like(most)
    tried = [one, *candidates(W, X.T @ X / len(X), scheme, feeds, most, exponents)]
    best = min(tried, key=lambda s: loss_slow(W, X, s[feeds], scheme))
    if loss_slow(W, held, best[feeds], scheme, X) < loss_slow(W, held, one[feeds], scheme, X):
        return best
    return None
