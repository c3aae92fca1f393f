"""Packed matrices equal the layout written out."""

from __future__ import annotations

import pytest
import torch

from oracles import packed as oracle
from pocketsize.quantization.unpack import awq_matrix, gptq_matrix, grouped_matrix

INPUTS, OUTPUTS, GROUP = 64, 32, 16


def drawn(bits: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [in, out], zeros and scales [groups, out]; the extremes of both occur."""
    generator = torch.Generator().manual_seed(seed)
    top = (1 << bits) - 1
    codes = torch.randint(0, top + 1, (INPUTS, OUTPUTS), generator=generator)
    zeros = torch.randint(0, top + 1, (INPUTS // GROUP, OUTPUTS), generator=generator)
    codes[0, 0], codes[0, 1], zeros[0, 0], zeros[0, 1] = 0, top, 0, top
    scales = torch.rand(INPUTS // GROUP, OUTPUTS, generator=generator).half() / 8
    return codes, zeros, scales


def in_turn() -> torch.Tensor:
    return torch.arange(INPUTS) // GROUP


@pytest.mark.parametrize("order", ["in turn", "g_idx"])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_equals_the_layout_written_out(bits: int, shifted: bool, order: str) -> None:
    codes, zeros, scales = drawn(bits)
    group_of = in_turn() if order == "in turn" else in_turn()[torch.randperm(INPUTS)]
    qweight, qzeros = oracle.gptq_pack(codes, zeros, bits, shifted=shifted)
    W = gptq_matrix(qweight, qzeros, scales.float(), group_of, bits=bits, shifted=shifted)
    assert torch.equal(W.double(), oracle.matrix(codes, zeros, scales, group_of))
    other = gptq_matrix(qweight, qzeros, scales.float(), group_of, bits=bits, shifted=not shifted)
    assert not torch.equal(other, W)


def test_awq_equals_the_layout_written_out() -> None:
    codes, zeros, scales = drawn(4)
    W = awq_matrix(oracle.awq_pack(codes), oracle.awq_pack(zeros), scales.float(), in_turn())
    assert torch.equal(W.double(), oracle.matrix(codes, zeros, scales, in_turn()))


def test_rows_can_be_permuted_and_inputs_are_untouched() -> None:
    codes, zeros, scales = (t.T.contiguous() for t in drawn(4))
    parts = codes.to(torch.uint8), scales.float(), zeros.to(torch.uint8)
    before = [part.clone() for part in parts]
    W, order = grouped_matrix(*parts, in_turn()), torch.randperm(OUTPUTS)
    assert torch.equal(grouped_matrix(*(part[order] for part in parts), in_turn()), W[order])
    assert all(torch.equal(part, was) for part, was in zip(parts, before, strict=True))
