"""The scales of SmoothQuant, one input and one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from oracles.activations import rounded_slow
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme


def scales_slow(W: Tensor, peak: Tensor, feeds: Tensor, fed: int, a: float) -> Tensor:
    """x^a / w^(1 - a) as the paper has it, to the nearest power of two around the middle of all of them."""
    found = []
    for k in range(fed):
        inputs = [j for j in range(len(feeds)) if int(feeds[j]) == k]
        x = max(float(peak[j]) for j in inputs)
        w = max(float(W[:, j].abs().max()) for j in inputs)
        found.append(x**a / w ** (1 - a))
    middle = (max(found) * min(found)) ** 0.5
    return torch.tensor(
        [2.0 ** min(max(round(torch.log2(torch.tensor(s / middle)).item()), -8), 8) for s in found]
    )


def loss_slow(W: Tensor, X: Tensor, s: Tensor, scheme: Scheme, seen: Tensor | None = None) -> float:
    """The squared error of what the tokens give."""
    rows = X if seen is None else seen
    Q = rtn(W * s, scheme, weight=(rows / s).square().mean(0)).dequantize().double()
    total = 0.0
    for x in X:
        wanted = W.double() @ x.double()
        given = Q @ rounded_slow((x / s)[None], floats=scheme.floats)[0].double()
        total += float((given - wanted).square().sum())
    return total
