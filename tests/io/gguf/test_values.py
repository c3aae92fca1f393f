"""Every block type equals another reader's values, in chunks as in one piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

from pocketsize.errors import DataError
from pocketsize.io.gguf import values
from pocketsize.io.gguf.header import GgufTensor
from pocketsize.io.gguf.values import part_of, read_values

ROWS, COLUMNS = 7, 512


def stored(kind: GGMLQuantizationType, path: Path) -> tuple[GgufTensor, np.ndarray]:
    """A tensor of random blocks at byte 64 of a file; scales are small, so that all values are finite."""
    block, size = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(int(kind)).integers(0, 256, (ROWS * COLUMNS // block, size), np.uint8)
    # Any byte can be the high one of a float16: below 0x60 none of them is infinite or NaN.
    raw &= np.uint8(0x3F) if kind.name not in ("IQ4_NL", "Q8_0") else np.uint8(0x5F)
    path.write_bytes(bytes(64) + raw.tobytes())
    return GgufTensor("t", kind.name, (ROWS, COLUMNS), path, 64, 64 + raw.size), raw


@pytest.mark.parametrize("number", sorted(GGML_BLOCK))
def test_blocks_are_what_transformers_takes_them_for(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = GGMLQuantizationType(number)
    tensor, raw = stored(kind, tmp_path / "t.gguf")
    theirs = dequantize(torch.from_numpy(raw.reshape(-1)), number).reshape(ROWS, COLUMNS)
    ours = read_values(tensor)
    assert ours.dtype == torch.float32 and bool(ours.isfinite().all()) and float(ours.std()) > 0
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=0)
    monkeypatch.setattr(values, "_ELEMENTS", 2 * COLUMNS)
    assert torch.equal(read_values(tensor), ours)


@pytest.mark.parametrize(("kind", "dtype"), values.FLOATS.items())
def test_floats_stay_as_they_are(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    W = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    (tmp_path / "t").write_bytes(bytes(W.view(torch.uint8).numpy().tobytes()))
    tensor = GgufTensor("t", kind, (2, 2, 32), tmp_path / "t", 0, W.numel() * W.itemsize)
    assert torch.equal(read_values(tensor), W.reshape(2, 2, 32))
    assert torch.equal(read_values(part_of(tensor, 1)), W[2:])


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    tensor, _ = stored(GGMLQuantizationType.Q4_K, tmp_path / "t.gguf")
    (tmp_path / "t.gguf").write_bytes(bytes(100))
    with pytest.raises(DataError, match=r"t.gguf: ends inside t; it was changed while being read"):
        read_values(tensor)
