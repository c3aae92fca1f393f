"""Rounding of tokens one value at a time."""

from __future__ import annotations

import torch
from torch import Tensor

# All values of float8 e4m3, NaN left out.
FLOATS = sorted({float(v) for v in torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn) if v == v})


def nearest_float(x: float) -> float:
    """The nearest float8; of two that are as near the one whose last bit is 0."""
    near = sorted(FLOATS, key=lambda v: abs(v - x))[:2]
    if abs(near[0] - x) < abs(near[1] - x):
        return near[0]
    bits = [int(torch.tensor(v).to(torch.float8_e4m3fn).view(torch.uint8)) for v in near]
    return near[0] if bits[0] % 2 == 0 else near[1]


def rounded_slow(X: Tensor, *, floats: bool) -> Tensor:
    """Each row on its own 256 levels."""
    out = torch.zeros_like(X)
    for t, row in enumerate(X.tolist()):
        largest = torch.tensor(max(abs(x) for x in row))
        if largest == 0:
            continue
        scale = largest / (448 if floats else 127.5)
        for j, x in enumerate(row):
            code = float(torch.tensor(x) / scale)
            whole = nearest_float(code) if floats else float(min(max(round(code), -128), 127))
            out[t, j] = torch.tensor(whole) * scale
    return out
