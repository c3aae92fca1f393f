"""Llama 3's stretched rotary embedding, which GGUF holds as one divisor for each frequency."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def llama3_divisors(
    theta: float, width: int, *, factor: float, low: float, high: float, old: int
) -> Float[Tensor, "half"]:
    """The divisor of each rotary frequency of a head `width` wide.

    Wavelengths above old / low are stretched by the whole factor, those below old / high not at
    all, those between by a mean of both.
    """
    frequency = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = old * frequency / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).to(torch.float32)
