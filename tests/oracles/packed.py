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
    columns = [_stream(column, bits) for column in codes.T.tolist()]
    qzeros = [_stream([(z - shifted) % (1 << bits) for z in row], bits) for row in zeros.tolist()]
    return torch.tensor(columns, dtype=torch.int32).T.contiguous(), torch.tensor(qzeros, dtype=torch.int32)


def awq_pack(codes: Tensor) -> Tensor:
    """Words of codes [rows, columns], as AutoAWQ's gemm layout has them for weights and for zeros."""
    words = []
    for row in codes.tolist():
        line = []
        for k in range(len(row) // 8):
            word = 0
            for i in range(8):
                word |= row[8 * k + AWQ[i]] << (4 * i)
            line.append(_signed(word))
        words.append(line)
    return torch.tensor(words, dtype=torch.int32)


def matrix(codes: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor) -> Tensor:
    """W [out, in] of codes [in, out], zeros and scales [groups, out]: entry by entry, in float64."""
    q, z, s, g = codes.tolist(), zeros.tolist(), scales.double().tolist(), group_of.tolist()
    inputs, outputs = codes.shape
    W = [[s[g[i]][j] * (q[i][j] - z[g[i]][j]) for i in range(inputs)] for j in range(outputs)]
    return torch.tensor(W, dtype=torch.float64)
