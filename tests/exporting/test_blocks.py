"""GGUF blocks, read by the `gguf` package's own reader."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize

from pocketsize.errors import UnsupportedError
from pocketsize.exporting.gguf.blocks import TYPES, block_type, pack
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme

SCHEMES = [
    Scheme(8, 32, symmetric=True),
    Scheme(5, 32, symmetric=True),
    Scheme(5, 32, scale_digits=6),
    Scheme(4, 32, symmetric=True),
    Scheme(4, 32, scale_digits=7),
    Scheme(4, 64, scale_digits=7),
    Scheme(4, 32, float_zeros=True),
    Scheme(5, 64, float_zeros=True),
    Scheme(5, 96, symmetric=True),
    Scheme(8, None, symmetric=True),
]


def every_code(scheme: Scheme, rows: int = 6, columns: int = 192) -> QWeight:
    """A matrix in which every code, every zero and scales from tiny to large occur."""
    generator = torch.Generator().manual_seed(scheme.bits)
    groups = columns // scheme.width(columns)
    codes = torch.arange(rows * columns).reshape(rows, columns) % (scheme.top + 1)
    codes = codes[:, torch.randperm(columns, generator=generator)]
    power = torch.randint(-10, 1, (rows, groups), generator=generator)
    digits = torch.randint(
        2 ** (scheme.scale_digits - 1), 2**scheme.scale_digits, (rows, groups), generator=generator
    )
    scale = digits.float() / 2 ** (scheme.scale_digits - 1) * 2.0**power
    if scheme.symmetric:
        scale *= torch.where(torch.rand(rows, groups, generator=generator) < 0.5, -1.0, 1.0)
        zero = torch.full((rows, groups), float(scheme.middle))
    else:
        zero = torch.randint(0, scheme.top + 1, (rows, groups), generator=generator).float()
        if scheme.float_zeros:
            zero = -(-scale * (zero + 0.37)).half().float() / scale
    return QWeight(codes.to(torch.uint8), scale, zero, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("source", ["every_code", "rtn"])
def test_a_reader_we_did_not_write_gives_the_same_numbers(scheme, source):
    if source == "rtn":
        W = torch.randn(8, 192, generator=torch.Generator().manual_seed(0)) * 0.05
        weight = rtn(W, scheme)
    else:
        weight = every_code(scheme)
    kind = block_type(scheme, 192, "w")
    data = pack(weight, "w")
    assert data.dtype == np.uint8 and data.shape == (weight.codes.shape[0], kind.row_bytes(192))
    back = dequantize(data, GGMLQuantizationType[kind.name])
    assert np.array_equal(back, weight.dequantize().numpy())


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda t: t.name)
def test_sizes_are_those_of_the_format(kind):
    from gguf import GGML_QUANT_SIZES

    assert GGML_QUANT_SIZES[GGMLQuantizationType[kind.name]] == (32, kind.block_bytes)


def test_permuting_rows_permutes_the_bytes():
    weight = every_code(SCHEMES[2])
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    moved = QWeight(weight.codes[order], weight.scale[order], weight.zero[order], weight.scheme)
    assert np.array_equal(pack(moved, "w"), pack(weight, "w")[order.numpy()])


def test_a_minimum_that_float16_would_round_is_refused():
    weight = QWeight(
        torch.zeros(1, 32, dtype=torch.uint8),
        torch.tensor([[255 / 2**8]]),
        torch.tensor([[13.0]]),
        Scheme(4, 32),
    )
    with pytest.raises(UnsupportedError, match=r"blk\.w: the minimum .* row 0, group 0 is not exact"):
        pack(weight, "blk.w")


@pytest.mark.parametrize(
    ("scheme", "match"),
    [
        (Scheme(8, 32), "8-bit asymmetric"),
        (Scheme(3, 32, symmetric=True), "3-bit symmetric"),
        (Scheme(4, 48), "group of 48"),
    ],
)
def test_what_has_no_block_is_refused_by_name(scheme, match):
    with pytest.raises(UnsupportedError, match=rf"some\.weight: .*{match}"):
        block_type(scheme, 96, "some.weight")


def test_inputs_are_untouched():
    weight = every_code(SCHEMES[4])
    before = weight.codes.clone(), weight.scale.clone(), weight.zero.clone()
    pack(weight, "w")
    assert all(
        torch.equal(a, b) for a, b in zip(before, (weight.codes, weight.scale, weight.zero), strict=True)
    )
