"""Gates decided and counted one value at a time, in plain Python."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def budget_level_slow(scores: list[Tensor], prices: list[float], budget: float) -> float:
    """Every value is tried as the level, from the lowest."""
    values = [(price / s.numel(), s.flatten().tolist()) for s, price in zip(scores, prices, strict=True)]
    for level in sorted(v for _, own in values for v in own):
        if sum(price * sum(v <= level for v in own) for price, own in values) >= budget * (1 - 1e-9):
            return level
    return math.inf


def leaves_slow(confidence: Tensor, level: float) -> list[int | None]:
    """The exit of each token, None where it stays to the end."""
    table = confidence.T.tolist()
    return [next((e for e, sure in enumerate(row) if sure >= level), None) for row in table]


def agreed_level_slow(confidence: Tensor, agrees: Tensor, wished: float) -> float:
    """Levels from the highest down, as long as enough tokens stay right."""
    best = math.inf
    for level in sorted({*confidence.flatten().tolist()}, reverse=True):
        left = leaves_slow(confidence, level)
        right = sum(e is None or bool(agrees[e, t]) for t, e in enumerate(left))
        if right / len(left) < wished:
            break
        best = level
    return best


def saving_level_slow(
    confidence: Tensor, saves: list[float], asks: list[float], reads: float, wished: float
) -> float:
    """Levels from the highest down, until enough is saved."""
    for level in sorted({*confidence.flatten().tolist()}, reverse=True):
        total = 0.0
        for e in leaves_slow(confidence, level):
            stops = len(saves) if e is None else e
            total -= sum(asks[: stops + 1]) + reads * stops
            total += 0.0 if e is None else saves[e]
        if total / confidence.shape[1] >= wished:
            return level
    return math.inf


def gated_product_slow(x: Tensor, t: Tensor, W: Tensor) -> Tensor:
    """W times what of x is beyond its threshold."""
    y = torch.zeros(len(W), dtype=torch.float64)
    for i in range(len(x)):
        if abs(float(x[i])) > float(t[i]):
            y += float(x[i]) * W[:, i].double()
    return y


def gated_mlp_slow(a: Tensor, t: Tensor, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What the channels give whose gate is beyond its threshold."""
    y = torch.zeros(len(down), dtype=torch.float64)
    for i in range(len(a)):
        if abs(float(a[i])) > float(t[i]):
            y += float(a[i]) * float(up[i].double() @ x.double()) * down[:, i].double()
    return y
