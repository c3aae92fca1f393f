"""Bits and streams of codes, there and back."""

import pytest
import torch

from pocketsize.pruning.bitmask import bits_of_rows, packed_codes, rows_of_bits, spread, unpacked_codes


def test_bits_are_lowest_first():
    mask = torch.tensor([[True, False, False, True, False, False, False, False, True]])
    assert bits_of_rows(mask).tolist() == [[0b1001, 1]]
    assert torch.equal(rows_of_bits(bits_of_rows(mask), 9), mask)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_codes_come_back(bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (7, 13), generator=generator, dtype=torch.uint8)
    mask = torch.rand(7, 13, generator=generator) < 0.5
    words = packed_codes(codes, mask, bits)
    left = int(mask.sum())
    assert len(words) == -(-left * bits // 32)
    back = spread(unpacked_codes(words, left, bits), mask)
    assert torch.equal(back, codes * mask)


def test_a_matrix_of_zeros_takes_no_words():
    assert len(packed_codes(torch.ones(2, 4, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.bool), 4)) == 0
