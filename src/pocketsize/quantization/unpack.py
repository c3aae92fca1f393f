"""Packed integer weights as matrices: the layouts in which GPTQ, AWQ and compressed-tensors folders come.

In all of them W = scale * (code - zero) with one scale and zero for a group of inputs. A code has at
most 8 bits and a scale at most 24 digits of which all these writers use 11, so float32 holds W
exactly.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64, UInt8
from torch import Tensor

# Where a word of AutoAWQ's `gemm` layout has the eight columns it holds, least significant first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_rows(
    packed: Int32[Tensor, "rows words"], bits: int, columns: int
) -> UInt8[Tensor, "rows columns"]:
    """The codes of rows that are dense streams of `bits` bits in little-endian 32-bit words."""
    raw = packed.contiguous().numpy().astype("<i4", copy=False).view(np.uint8)
    if 8 % bits == 0:
        per, mask = 8 // bits, (1 << bits) - 1
        codes = np.empty((len(raw), raw.shape[1] * per), np.uint8)
        for j in range(per):
            codes[:, j::per] = (raw >> np.uint8(j * bits)) & np.uint8(mask)
        return torch.from_numpy(codes[:, :columns])
    stream = np.unpackbits(raw, axis=1, count=columns * bits, bitorder="little")
    grouped = stream.reshape(len(raw), columns, bits)
    return torch.from_numpy(np.packbits(grouped, axis=2, bitorder="little")[:, :, 0])


def gptq_matrix(
    qweight: Int32[Tensor, "words out"],
    qzeros: Int32[Tensor, "groups zwords"],
    scales: Float[Tensor, "groups out"],
    group_of: Int64[Tensor, "in"],
    *,
    bits: int,
    shifted: bool,
) -> Float[Tensor, "out in"]:
    """The matrix of a GPTQ layer, whose codes are packed along the inputs.

    `group_of` is the group of each input (g_idx). `shifted`: zeros are stored less one, as the first
    version of the format has them; 0 is then stored as the largest code.
    """
    out = scales.shape[1]
    codes = unpack_rows(qweight.T.contiguous(), bits, len(group_of))
    zeros = unpack_rows(qzeros, bits, out)
    if shifted:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    return grouped_matrix(codes, scales.T.contiguous(), zeros.T.contiguous(), group_of)


def awq_matrix(
    qweight: Int32[Tensor, "in words"],
    qzeros: Int32[Tensor, "groups words"],
    scales: Float[Tensor, "groups out"],
    group_of: Int64[Tensor, "in"],
) -> Float[Tensor, "out in"]:
    """The matrix of a 4-bit AWQ layer in the `gemm` layout: codes packed along the outputs, out of order."""
    out = scales.shape[1]
    place = torch.tensor(AWQ_ORDER).argsort()

    def unpack(packed: Int32[Tensor, "rows words"]) -> UInt8[Tensor, "rows out"]:
        return unpack_rows(packed, 4, out).reshape(len(packed), -1, 8)[:, :, place].reshape(len(packed), out)

    columns = unpack(qweight).T.contiguous(), scales.T.contiguous(), unpack(qzeros).T.contiguous()
    return grouped_matrix(*columns, group_of)


def grouped_matrix(
    codes: UInt8[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero: UInt8[Tensor, "out groups"],
    group_of: Int64[Tensor, "in"],
) -> Float[Tensor, "out in"]:
    """scale * (code - zero), float32; `group_of` is the group of each input."""
    W = codes.to(torch.float32)
    W -= zero.to(torch.float32)[:, group_of]
    W *= scale.to(torch.float32)[:, group_of]
    return W


def unpack_halves(
    packed: UInt8[Tensor, "rows bytes"], *, high_first: bool = False
) -> UInt8[Tensor, "rows codes"]:
    """The codes of rows of bytes that hold two each; the first is in the low half, or in the high one."""
    halves = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return torch.stack(halves, dim=-1).flatten(1)


def table_matrix(
    codes: UInt8[Tensor, "out in"], scale: Float[Tensor, "out groups"], values: Float[Tensor, "16"]
) -> Float[Tensor, "out in"]:
    """scale * values[code], float32; groups lie one after the other."""
    return (values[codes.int()].view(*scale.shape, -1) * scale[..., None]).view(codes.shape)
