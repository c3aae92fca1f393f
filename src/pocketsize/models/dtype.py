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

    Emulated bfloat16 is slower than float32, so what torch merely supports does not count. Neither do
    Intel's instructions for it without its matrix units: 84 against 150 GFLOP/s of one core in float32.
    """
    if working_device().type == "cuda":
        hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if hardware else torch.float32
    flags = torch.cpu.get_capabilities()
    hardware = flags.get("amx_bf16") or flags.get("bf16")
    hardware = hardware or (flags.get("avx512_bf16") and "Intel" not in str(flags.get("cpu_name")))
    return torch.bfloat16 if hardware else torch.float32
