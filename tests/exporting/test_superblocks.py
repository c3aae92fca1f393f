"""K-quants as GGUF blocks, read by the `gguf` package's own reader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from pocketsize.errors import UnsupportedError
from pocketsize.exporting.gguf.blocks import block_type, lacks, pack
from pocketsize.exporting.gguf.superblocks import TYPES
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import NAMED, Scheme

each = pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)


def every_code(scheme: Scheme, rows: int = 4, columns: int = 512) -> QWeight:
    """A matrix in which every code occurs, scales and minima of all multiples."""
    g = torch.Generator().manual_seed(scheme.bits)
    groups, per = columns // scheme.width(columns), 256 // scheme.width(columns)
    codes = torch.randint(0, scheme.top + 1, (rows, columns), generator=g)

    def values(least: int) -> torch.Tensor:
        unit = torch.rand(rows, groups // per, generator=g) * 2.0 ** torch.randint(
            -12, 0, (rows, 1), generator=g
        )
        count = torch.randint(least, scheme.top_scale + 1, (rows, groups), generator=g)
        return unit.half().float().repeat_interleave(per, 1) * count

    scale = values(1)
    if scheme.symmetric:
        scale *= torch.where(torch.rand(rows, groups, generator=g) < 0.5, -1.0, 1.0)
        zero = torch.full((rows, groups), float(scheme.middle))
    else:
        zero = values(0) / scale
    return QWeight(codes.to(torch.uint8), scale, zero, scheme)


@each
@pytest.mark.parametrize("source", ["every code", "rounded", "tiny weights", "zeros"])
def test_a_reader_we_did_not_write_gives_the_same_bits(kind, source) -> None:
    W = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    weight = {
        "every code": lambda: every_code(kind.scheme),
        "rounded": lambda: rtn(W * 0.05, kind.scheme),
        "tiny weights": lambda: rtn(W * 1e-5, kind.scheme),
        "zeros": lambda: rtn(W * 0, kind.scheme),
    }[source]()
    data = pack(weight, "w")
    assert data.dtype == np.uint8 and data.shape == (len(weight.codes), kind.row_bytes(512))
    back = dequantize(data, GGMLQuantizationType[kind.name])
    assert back.tobytes() == weight.dequantize().numpy().tobytes()


@each
def test_sizes_are_those_of_the_format(kind) -> None:
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.name]]
    assert (elements, size) == (256, kind.row_bytes(256))
    assert kind.scheme == NAMED[kind.name] and lacks(kind.scheme) is None
    assert block_type(kind.scheme, 512, "w") is kind


def test_permuting_rows_permutes_the_bytes() -> None:
    weight = every_code(NAMED["Q5_K"])
    order = torch.tensor([2, 0, 3, 1])
    moved = QWeight(weight.codes[order], weight.scale[order], weight.zero[order], weight.scheme)
    assert np.array_equal(pack(moved, "w"), pack(weight, "w")[order.numpy()])


def test_what_no_block_holds_is_refused_by_name() -> None:
    odd = Scheme(5, 16, symmetric=True, scale_bits=8)
    assert lacks(odd) == "super-blocks of 5-bit codes"
    with pytest.raises(UnsupportedError, match=r"blk: .*super-blocks"):
        block_type(odd, 512, "blk")
    with pytest.raises(UnsupportedError, match=r"blk: .*576"):
        block_type(NAMED["Q4_K"], 576, "blk")
    weight = every_code(NAMED["Q4_K"])
    with pytest.raises(UnsupportedError, match="blk: scales of a super-block"):
        pack(QWeight(weight.codes, weight.scale * 1.001, weight.zero, weight.scheme), "blk")
