"""The scale search of a codebook with plain torch, one group at a time, and packings bit by bit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oracles.grid import stored as digits_stored
from pocketsize.quantization.codebook import LEAST, Codebook
from pocketsize.quantization.codebook_loops import GROWTH, POWERS
from pocketsize.quantization.compiled import HOPELESS, ROUNDS, SHRINK, STEPS


def stored(s: float, table: Codebook, unit: float) -> float:
    """The nearest scale that the table's format stores."""
    size = max(abs(s), LEAST.get(table.scales, 0.0))
    if table.scales == "half":
        return digits_stored(s, 8)
    if table.scales == "e8m0":
        low = 2.0 ** math.floor(math.log2(size))
        size = low if size - low <= 2 * low - size else 2 * low
    elif table.scales == "e4m3":
        every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double() * unit
        size = float(every[(every - size).abs().argmin()])
    return math.copysign(size, s)


def error_of(w: Tensor, d: Tensor, s: float, table: Codebook) -> tuple[float, Tensor]:
    """Weighted squared error of a scale, and the entries it gives."""
    values = torch.tensor(table.values, dtype=torch.float64)
    chosen = values[(w.double()[:, None] / s - values).abs().argmin(dim=1)]
    return float((d.double() * (s * chosen - w.double()) ** 2).sum()), chosen


def starts(w: Tensor, table: Codebook, unit: float, *, search: bool) -> list[float]:
    """All scales the search begins from."""
    lo, hi = min(0.0, float(w.min())), max(0.0, float(w.max()))
    left, right = -table.values[0], table.values[-1]
    ends = [max(-lo / left, hi / right)] + [-max(-lo / right, hi / left)] * table.lopsided
    if table.by_mean:
        mean = float(w.abs().double().mean())
        return [stored(mean * (1 + GROWTH * (k - 1)), table, unit) for k in range(9)] if search else [mean]
    if table.scales == "e8m0":
        top = math.ceil(math.log2(ends[0]))
        return [2.0 ** (top - k) for k in range(POWERS if search else 2)]
    return [
        stored((1 - SHRINK * k) * end, table, unit) for k in range(STEPS + 1 if search else 1) for end in ends
    ]


def best_error(w: Tensor, d: Tensor, table: Codebook, unit: float, *, search: bool) -> float:
    """The least weighted error the search can reach on one group."""
    best = float("inf")
    for s in starts(w, table, unit, search=search):
        s = stored(s, table, unit)
        for _ in range(ROUNDS + 1 if search else 1):
            error, t = error_of(w, d, s, table)
            hopeless = error > HOPELESS * best
            best = min(best, error)
            norm = float((d.double() * t * t).sum())
            if hopeless or norm <= 0:
                break
            s = stored(float((d.double() * t * w.double()).sum()) / norm, table, unit)
    return best


def trits_of(byte: int) -> list[int]:
    """The five digits to base 3 of a byte, as a reader takes them: times 3, and what is above 256."""
    digits = []
    for _ in range(5):
        digits.append(byte * 3 >> 8)
        byte = byte * 3 & 255
    return digits
