"""What a linear reads, rounded token by token as it runs: the other half of W8A8 and FP8."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Half of the 255 steps of int8, as compressed-tensors spreads a token over them: the largest value of a
# token is cut to 127 steps. vLLM's kernels divide by 127.
_STEPS = 127.5
_LARGEST_FLOAT = 448.0


def rounded(X: Float[Tensor, "*batch in"], *, floats: bool) -> Float[Tensor, "*batch in"]:
    """Each token on 256 levels around zero, its scale the largest of its magnitudes: int8, or float8 e4m3.

        x_hat = s q,   s = max_j |x_j| / 127.5,   q_j = round(x_j / s) in -128 .. 127

    For `floats` s = max_j |x_j| / 448 and q_j is the nearest float8. Computed in float32, in the order of
    the stock loader, so that both give the same bits; X is left untouched.
    """
    x = X.to(torch.float32)
    scale = x.abs().amax(-1, keepdim=True) / (_LARGEST_FLOAT if floats else _STEPS)
    scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
    codes = x / scale
    if floats:
        codes = codes.clamp_(-_LARGEST_FLOAT, _LARGEST_FLOAT).to(torch.float8_e4m3fn).to(torch.float32)
    else:
        codes = codes.clamp_(-128, 127).round_()
    return codes.mul_(scale).to(X.dtype)
