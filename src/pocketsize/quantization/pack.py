"""Codes as the packed words of folders: the layouts that `unpack` reads, written."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from pocketsize.errors import UnsupportedError
from pocketsize.quantization.unpack import AWQ_ORDER


def pack_rows(codes: UInt8[Tensor, "rows columns"], bits: int) -> Int32[Tensor, "rows words"]:
    """The rows of unsigned codes as dense streams of `bits` bits, the last word filled with zeros."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    stream = np.unpackbits(codes.numpy()[:, :, None], axis=2, count=bits, bitorder="little").reshape(rows, -1)
    packed = np.zeros((rows, words * 4), np.uint8)
    packed[:, : -(-columns * bits // 8)] = np.packbits(stream, axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").astype(np.int32, copy=False))


def gptq_codes(codes: UInt8[Tensor, "out in"], bits: int) -> Int32[Tensor, "words out"]:
    """Codes as a GPTQ layer has them: packed along the inputs."""
    return pack_rows(codes, bits).T.contiguous()


def gptq_zeros(
    zero: Float[Tensor, "out groups"], bits: int, *, shifted: bool
) -> Int32[Tensor, "groups words"]:
    """Zeros as a GPTQ layer has them: packed along the outputs.

    `shifted`: less one, as the first version of the format has them. Of a zero of 0 its readers make
    0, 2^bits, or a wrong neighbour, so there must be none.
    """
    if shifted and not bool(zero.all()):
        raise UnsupportedError(
            f"{int((zero == 0).sum())} zeros are 0, which the first GPTQ format does not hold"
        )
    return pack_rows((zero - float(shifted)).to(torch.uint8).T.contiguous(), bits)


def awq_words(columns: UInt8[Tensor, "rows out"]) -> Int32[Tensor, "rows words"]:
    """Codes or zeros of 4 bits as AWQ's `gemm` layout has them: packed along the outputs, out of order."""
    order = torch.tensor(AWQ_ORDER)
    return pack_rows(columns.reshape(len(columns), -1, 8)[:, :, order].reshape(columns.shape), 4)
