"""A quantized matrix as GGUF blocks: the codes and scales it has, bit for bit, nothing rounded again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from pocketsize.errors import UnsupportedError
from pocketsize.exporting.gguf import codebooks, superblocks
from pocketsize.exporting.gguf.codebooks import TableType, pack_table
from pocketsize.exporting.gguf.halves import halves
from pocketsize.exporting.gguf.superblocks import SuperBlockType, super_block_type
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.scheme import Scheme

BLOCK = 32


@dataclass(frozen=True, slots=True)
class BlockType:
    """A GGUF type of 32 weights a block: W = d * (code - middle), or d * code + m with a minimum."""

    name: str
    bits: int
    minimum: bool

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: a float16 scale, perhaps a float16 minimum, and 32 codes."""
        return 2 + 2 * self.minimum + BLOCK * self.bits // 8

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` weights."""
        return columns // BLOCK * self.block_bytes


TYPES = {
    (t.bits, t.minimum): t
    for t in (
        BlockType("Q4_0", 4, False),
        BlockType("Q4_1", 4, True),
        BlockType("Q5_0", 5, False),
        BlockType("Q5_1", 5, True),
        BlockType("Q8_0", 8, False),
    )
}


def lacks(scheme: Scheme) -> str | None:
    """What no block type holds of a scheme; None where one holds all of it."""
    if scheme.activations:
        return f"rounded inputs ({scheme.name})"
    if scheme.codebook is not None:
        return None if scheme.codebook in codebooks.TYPES else f"the codebook {scheme.name}"
    if scheme.super_blocks:
        return None if scheme in superblocks.TYPES else f"super-blocks of {scheme.bits}-bit codes"
    if (scheme.bits, not scheme.symmetric) not in TYPES:
        return f"{scheme.bits}-bit {'symmetric' if scheme.symmetric else 'asymmetric'} codes"
    return None


def block_type(scheme: Scheme, columns: int, name: str) -> BlockType | TableType | SuperBlockType:
    """The block type that holds a matrix of this scheme exactly; `name` is for the error."""
    if (missing := lacks(scheme)) is not None:
        raise UnsupportedError(
            f"{name}: GGUF has no block for {missing}; use 4 or 5 bits, or 8 bits with symmetric: true"
        )
    if scheme.super_blocks:
        return super_block_type(scheme, columns, name)
    table = codebooks.TYPES.get(scheme.codebook or "")
    if scheme.width(columns) % (block := table.block if table else BLOCK):
        raise UnsupportedError(
            f"{name}: GGUF blocks hold {block} weights; a group of {scheme.width(columns)} cannot be stored"
        )
    if table:
        return table
    return TYPES[scheme.bits, not scheme.symmetric]


def pack(weight: QWeight, name: str) -> UInt8[np.ndarray, "out bytes"]:
    """The rows of a quantized matrix as block bytes.

    A group larger than 32 repeats its scale in each of its blocks. Scale, and minimum
    -scale * zero, must be exact in float16; `name` is for the error when they are not.
    """
    out, columns = weight.codes.shape
    kind = block_type(weight.scheme, columns, name)
    if isinstance(kind, TableType):
        return pack_table(weight, name)
    if isinstance(kind, SuperBlockType):
        return superblocks.pack(weight, name)
    repeat = columns // BLOCK // weight.scale.shape[1]
    codes = weight.codes.numpy().reshape(out, columns // BLOCK, BLOCK)
    parts = [halves(weight.scale, repeat, name, "scale")]
    if kind.minimum:
        parts.append(halves(weight.minimum, repeat, name, "minimum (scale x zero)"))
    elif not bool((weight.zero == weight.scheme.middle).all()):
        raise UnsupportedError(f"{name}: a symmetric grid must have its zero at {weight.scheme.middle}")
    if kind.bits == 8:
        parts.append(codes ^ np.uint8(0x80))  # code - 128 in two's complement
    else:
        if kind.bits == 5:
            parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        low, high = codes[..., : BLOCK // 2], codes[..., BLOCK // 2 :]
        parts.append((low & 0x0F) | (high << 4))
    return np.concatenate(parts, axis=-1).reshape(out, kind.row_bytes(columns))
