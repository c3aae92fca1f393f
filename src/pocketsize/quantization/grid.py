"""The uniform grid: a stored matrix, and how its scales and zeros are chosen."""

from __future__ import annotations

from dataclasses import dataclass


from jaxtyping import Float, UInt8
from torch import Tensor

from pocketsize.quantization.scheme import Scheme


@dataclass(frozen=True, slots=True)
class QWeight:
    """A quantized matrix: codes on a per-group affine grid, W ~ scale * (codes - zero).

    `scale` (float32) holds values that bfloat16 and float16 both store exactly and may be
    negative on a symmetric grid; `zero` (float32) holds whole numbers within 0 .. 2^bits - 1.
    """

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]
    scheme: Scheme

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The matrix the codes stand for, float32."""
        out, columns = self.codes.shape
        grouped = self.codes.view(out, self.scale.shape[1], -1).float()
        return (self.scale[..., None] * (grouped - self.zero[..., None])).view(out, columns)
