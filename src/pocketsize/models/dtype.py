"""Number formats: those that a folder may have, and the one that forward passes run in here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from pocketsize.models.device import working_device

# What people call them in recipes.
NAMES: Mapping[str, torch.dtype] = MappingProxyType(
    {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
)


def forward_dtype() -> torch.dtype:
    """bfloat16 where the device that works multiplies it in hardware, else float32.

    Emulated bfloat16 is slower than float32, so what torch merely supports does not count.
    """
    if working_device().type == "cuda":
        hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if hardware else torch.float32
    flags = torch.cpu.get_capabilities()
    hardware = any(flags.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if hardware else torch.float32
