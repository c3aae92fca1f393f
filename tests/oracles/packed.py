"""GPTQ's and AWQ's layouts written out: one code at a time, one bit position at a time."""

from __future__ import annotations

import torch
from torch import Tensor

# AutoAWQ puts column 8 k + AWQ[i] of a matrix into nibble i of word k.
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _stream(codes: list[int], bits: int) -> list[int]:
    """Codes one after the other in one long number, cut into words of 32 bits."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return [_signed(number >> (32 * k)) for k in range(len(codes) * bits // 32)]


def gptq_pack(codes: Tensor, zeros: Tensor, bits: int, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """qweight and qzeros of codes [in, out] and zeros [groups, out]."""
    columns = [_stream([int(c) for c in codes[:, j]], bits) for j in range(codes.shape[1])]
    stored = [[(int(z) - shifted) % (1 << bits) for z in row] for row in zeros]
    qzeros = [_stream(row, bits) for row in stored]
    return torch.tensor(columns, dtype=torch.int32).T.contiguous(), torch.tensor(qzeros, dtype=torch.int32)


def awq_pack(codes: Tensor) -> Tensor:
    """Words of codes [rows, columns], as AutoAWQ's gemm layout has them for weights and for zeros."""
    words = []
    for row in codes:
        line = []
        for k in range(len(row) // 8):
            word = 0
            for i in range(8):
                word |= int(row[8 * k + AWQ[i]]) << (4 * i)
            line.append(_signed(word))
        words.append(line)
    return torch.tensor(words, dtype=torch.int32)


def matrix(codes: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor) -> Tensor:
    """W [out, in] of codes [in, out], zeros and scales [groups, out]: entry by entry, in float64."""
    inputs, outputs = codes.shape
    W = torch.zeros(outputs, inputs, dtype=torch.float64)
    for i in range(inputs):
        for j in range(outputs):
            g = int(group_of[i])
            W[j, i] = float(scales[g, j]) * (int(codes[i, j]) - int(zeros[g, j]))
    return W
