"""Where a pruned matrix is not zero, a bit for each weight, and what is there."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64, Shaped, UInt8
from torch import Tensor


def bits_of_rows(mask: Bool[Tensor, "rows columns"]) -> UInt8[Tensor, "rows bytes"]:
    """The bits of each row, its first weight in the lowest one of the first byte."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))


def rows_of_bits(bits: UInt8[Tensor, "rows bytes"], columns: int) -> Bool[Tensor, "rows columns"]:
    """The mask that `bits_of_rows` packed."""
    found = np.unpackbits(bits.numpy(), axis=1, count=columns, bitorder="little")
    return torch.from_numpy(found.view(np.bool_))


def row_offsets(mask: Bool[Tensor, "rows columns"]) -> Int64[Tensor, "rows"]:
    """Where each row begins in what is left, row after row."""
    counts = mask.sum(1)
    return counts.cumsum(0) - counts


def packed_codes(
    codes: UInt8[Tensor, "rows columns"], mask: Bool[Tensor, "rows columns"], bits: int
) -> Int32[Tensor, "words"]:
    """The codes where the mask is True, row after row, as one dense stream of little-endian words."""
    left = codes[mask].numpy()
    stream = np.unpackbits(left[:, None], axis=1, count=bits, bitorder="little").reshape(-1)
    packed = np.zeros(-(-len(left) * bits // 32) * 4, np.uint8)
    packed[: -(-len(stream) // 8)] = np.packbits(stream, bitorder="little")
    return torch.from_numpy(packed.view("<i4").astype(np.int32, copy=False))


def unpacked_codes(words: Int32[Tensor, "words"], count: int, bits: int) -> UInt8[Tensor, "count"]:
    """The codes that `packed_codes` packed."""
    raw = words.contiguous().numpy().astype("<i4", copy=False).view(np.uint8)
    stream = np.unpackbits(raw, count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little")[:, 0])


def spread(
    values: Shaped[Tensor, "left"], mask: Bool[Tensor, "rows columns"]
) -> Shaped[Tensor, "rows columns"]:
    """A matrix with these values, row after row, where the mask is True, and zeros elsewhere."""
    W = torch.zeros(mask.shape, dtype=values.dtype)
    W[mask] = values
    return W
