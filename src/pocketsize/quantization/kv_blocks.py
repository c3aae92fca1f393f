"""ggml's block types for keys and values, rounded as it rounds them when they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from pocketsize.quantization.codebook import CODEBOOKS

BLOCK = 32
# Bits per value, the scale (and minimum) of a block among them.
BITS: Mapping[str, float] = MappingProxyType(
    {
        "f32": 32,
        "f16": 16,
        "bf16": 16,
        "q8_0": 8.5,
        "q5_1": 6,
        "q5_0": 5.5,
        "q4_1": 5,
        "q4_0": 4.5,
        "iq4_nl": 4.5,
    }
)
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

Blocks = Float[Tensor, "*blocks 32"]


def rounded(x: Float[Tensor, "*batch n"], kind: str) -> Float[Tensor, "*batch n"]:
    """x as the type stores it, block by block along the last axis; scales and minima are float16."""
    if kind in _FLOATS:
        return x.to(_FLOATS[kind]).to(x.dtype)
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    family, _, last = kind.partition("_")
    if kind == "q8_0":
        found = _even(blocks)
    elif kind == "iq4_nl":
        found = _nonlinear(blocks)
    elif last == "0":
        found = _signed(blocks, int(family[1:]))
    else:
        found = _offset(blocks, int(family[1:]))
    return found.flatten(-2).to(x.dtype)


def _even(x: Blocks) -> Blocks:
    """q8_0: the largest magnitude is code 127 or -127."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return _half(scale) * (x * _inverse(scale)).round()


def _signed(x: Blocks, bits: int) -> Blocks:
    """q4_0, q5_0: the entry of largest magnitude is the lowest code, whatever its sign."""
    middle = 2 ** (bits - 1)
    scale = _peak(x) / -middle
    codes = (x * _inverse(scale) + middle + 0.5).floor().clamp(0, 2 * middle - 1)
    return _half(scale) * (codes - middle)


def _offset(x: Blocks, bits: int) -> Blocks:
    """q4_1, q5_1: codes span minimum to maximum."""
    least, top = x.amin(-1, keepdim=True), 2**bits - 1
    scale = (x.amax(-1, keepdim=True) - least) / top
    codes = ((x - least) * _inverse(scale) + 0.5).floor().clamp(0, top)
    return _half(scale) * codes + _half(least)


def _nonlinear(x: Blocks) -> Blocks:
    """iq4_nl: the entry of largest magnitude meets the lowest value; then the scale fits the codes.

    The scale is the least-squares one with weights x^2.
    """
    values = torch.tensor(CODEBOOKS["iq4_nl"].values, device=x.device)
    codes = values[
        torch.bucketize(x * _inverse(_peak(x) / values[0]), (values[1:] + values[:-1]) / 2, right=True)
    ]
    over = (x**2 * codes**2).sum(-1, keepdim=True)
    scale = (x**3 * codes).sum(-1, keepdim=True) * _inverse(over)
    return _half(scale) * codes


def _peak(x: Blocks) -> Float[Tensor, "*blocks 1"]:
    """The entry of largest magnitude, the first of several."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(x == 0, 0, 1 / x)


def _half(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(torch.float32)
