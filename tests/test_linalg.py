"""Sums that a whole calibration goes into keep their digits."""

from __future__ import annotations

import pytest
import torch

from pocketsize.linalg import Gram


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_sum_is_kept_in_float32_whatever_the_inputs_are(dtype: torch.dtype) -> None:
    gram, row = Gram.zeros(4), torch.ones(1, 4, dtype=dtype)
    for _ in range(3000):  # bfloat16 would stand still at 256, float16 at 2048
        gram.update(row)
    assert gram.total.dtype == torch.float32 and float(gram.total[0, 3]) == 3000.0
    large = Gram.zeros(4)
    for _ in range(40):
        large.update(torch.full((1, 4), 60.0, dtype=dtype))  # 144,000 is beyond float16
    assert float(large.total[0, 0]) == 144_000.0
