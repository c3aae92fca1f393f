"""Codebooks as GGUF blocks: the codes and scales of a matrix, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import UInt8

from pocketsize.exporting.fp4 import exponents_of
from pocketsize.exporting.gguf.halves import halves
from pocketsize.quantization.grid import QWeight


@dataclass(frozen=True, slots=True)
class TableType:
    """A GGUF type whose codes stand for the entries of a table: `block` weights in `block_bytes`."""

    name: str
    block: int
    block_bytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` weights."""
        return columns // self.block * self.block_bytes


TYPES: Mapping[str, TableType] = MappingProxyType(
    {
        "iq4_nl": TableType("IQ4_NL", 32, 18),
        "mxfp4": TableType("MXFP4", 32, 17),
        "ternary": TableType("TQ2_0", 256, 66),
        "trits": TableType("TQ1_0", 256, 54),
    }
)


def pack_table(weight: QWeight, name: str) -> UInt8[np.ndarray, "out bytes"]:
    """The rows of a matrix with a codebook as block bytes; `name` is for errors."""
    table = weight.scheme.table
    assert table is not None and weight.scheme.codebook is not None
    kind, (out, columns) = TYPES[weight.scheme.codebook], weight.codes.shape
    codes = weight.codes.numpy()
    if table.stored is not None:
        codes = np.array(table.stored, np.uint8)[codes]
    codes = codes.reshape(out, columns // kind.block, kind.block)
    repeat = codes.shape[1] // weight.scale.shape[1]
    if table.scales == "e8m0":
        parts = [exponents_of(weight.scale).numpy()[..., None], _nibbles(codes)]
    elif kind.block == 32:
        parts = [halves(weight.scale, repeat, name, "scale"), _nibbles(codes)]
    else:
        pack = _trits if weight.scheme.codebook == "trits" else _pairs
        parts = [pack(codes), halves(weight.scale, repeat, name, "scale")]
    return np.concatenate(parts, axis=-1).reshape(out, kind.row_bytes(columns))


def _nibbles(codes: UInt8[np.ndarray, "out blocks 32"]) -> UInt8[np.ndarray, "out blocks 16"]:
    """The first half of a block in the low half of each byte."""
    return codes[..., :16] | (codes[..., 16:] << 4)


def _pairs(codes: UInt8[np.ndarray, "out blocks 256"]) -> UInt8[np.ndarray, "out blocks 64"]:
    """Two bits a code: four runs of 32 in a run of bytes, the first in the lowest bits."""
    runs = codes.reshape(*codes.shape[:2], 2, 4, 32)
    packed = runs[..., 0, :] | runs[..., 1, :] << 2 | runs[..., 2, :] << 4 | runs[..., 3, :] << 6
    return packed.reshape(*codes.shape[:2], 64)


def _trits(codes: UInt8[np.ndarray, "out blocks 256"]) -> UInt8[np.ndarray, "out blocks 52"]:
    """Five codes in a byte, of 32 and of 16 in a run, and of the last 16 four."""
    parts = [codes[..., :160], codes[..., 160:240], codes[..., 240:]]
    packed = [_digits(part.reshape(*part.shape[:2], n, -1)) for part, n in zip(parts, (5, 5, 4), strict=True)]
    return np.concatenate(packed, axis=-1)


def _digits(codes: UInt8[np.ndarray, "out blocks n bytes"]) -> UInt8[np.ndarray, "out blocks bytes"]:
    """Digits to base 3 of a fraction of 3^5 = 243, the first code the highest, in units of 1/256 upwards.

    Readers multiply a byte by 3 for each digit that they take from its top.
    """
    number = np.zeros(codes[..., 0, :].shape, np.uint16)
    for j in range(codes.shape[-2]):
        number = number * 3 + codes[..., j, :]
    number *= 3 ** (5 - codes.shape[-2])
    return ((number * 256 + 242) // 243).astype(np.uint8)
