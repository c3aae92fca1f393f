"""The number format that forward passes run in on this machine."""

from __future__ import annotations

import torch


def forward_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware, else float32.

    Emulated bfloat16 is slower than float32, so what torch merely supports does not count.
    """
    flags = torch.cpu.get_capabilities()
    hardware = any(flags.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if hardware else torch.float32
