"""Packed words equal those of an oracle that goes bit by bit, and unpack to the codes they are of."""

from __future__ import annotations

import pytest
import torch

from oracles import packed as oracle
from pocketsize.errors import UnsupportedError
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.pack import awq_words, gptq_codes, gptq_zeros
from pocketsize.quantization.scheme import Scheme
from pocketsize.quantization.unpack import awq_matrix, gptq_matrix

OUT, IN, GROUP = 64, 96, 32
GROUP_OF = torch.arange(IN) // GROUP


def weight(bits: int, *, lowest: int = 0) -> QWeight:
    """Random codes, zeros from `lowest` to the largest code, scales of float16."""
    draw, top = torch.Generator().manual_seed(bits), (1 << bits) - 1
    codes = torch.randint(0, top + 1, (OUT, IN), generator=draw).to(torch.uint8)
    zero = torch.randint(lowest, top + 1, (OUT, IN // GROUP), generator=draw).float()
    zero[0, :2] = torch.tensor([float(lowest), float(top)])
    scale = (torch.rand(zero.shape, generator=draw) + 0.01).half().float()
    return QWeight(codes, scale, zero, Scheme(bits, GROUP))


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_words_equal_the_oracle_and_come_back(bits: int, shifted: bool) -> None:
    given = weight(bits, lowest=int(shifted))
    before = given.codes.clone(), given.zero.clone()
    qweight, qzeros = gptq_codes(given.codes, bits), gptq_zeros(given.zero, bits, shifted=shifted)
    expected = oracle.gptq_pack(given.codes.T.long(), given.zero.T.long(), bits, shifted=shifted)
    assert torch.equal(qweight, expected[0]) and torch.equal(qzeros, expected[1])
    back = gptq_matrix(qweight, qzeros, given.scale.T, GROUP_OF, bits=bits, shifted=shifted)
    assert torch.equal(back, given.dequantize())
    assert torch.equal(given.codes, before[0]) and torch.equal(given.zero, before[1])


def test_awq_words_equal_the_oracle_and_come_back() -> None:
    given = weight(4)
    columns, zeros = given.codes.T.contiguous(), given.zero.to(torch.uint8).T.contiguous()
    before = columns.clone()
    qweight, qzeros = awq_words(columns), awq_words(zeros)
    assert torch.equal(qweight, oracle.awq_pack(columns)) and torch.equal(qzeros, oracle.awq_pack(zeros))
    assert torch.equal(awq_matrix(qweight, qzeros, given.scale.T, GROUP_OF), given.dequantize())
    assert torch.equal(columns, before)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_of_0_has_no_place_in_the_first_version_alone(bits: int) -> None:
    given = weight(bits)
    with pytest.raises(UnsupportedError, match="zeros are 0"):
        gptq_zeros(given.zero, bits, shifted=True)
    assert gptq_zeros(given.zero, bits, shifted=False).shape == (IN // GROUP, OUT * bits // 32)
