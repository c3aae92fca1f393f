"""Values of groups as the float16 that GGUF blocks hold."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pocketsize.errors import UnsupportedError


def halves(
    values: Float[Tensor, "out groups"], repeat: int, name: str, what: str
) -> UInt8[np.ndarray, "out blocks 2"]:
    """Values as little-endian float16 bytes, each repeated; refuses what float16 would change."""
    halves = values.to(torch.float16)
    wrong = halves.to(torch.float32) != values
    if bool(wrong.any()):
        row, group = (int(i) for i in wrong.nonzero()[0])
        raise UnsupportedError(
            f"{name}: the {what} {float(values[row, group])!r} of row {row}, group {group} is not exact in "
            "float16; quantize with gguf among the exports, which keeps fewer digits in each scale"
        )
    stored = halves.repeat_interleave(repeat, dim=1).numpy().astype("<f2")
    return stored.view(np.uint8).reshape(*stored.shape, 2)
