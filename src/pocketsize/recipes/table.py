"""Every recipe step by the word a recipe uses for it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pocketsize.recipes.awq import Awq
from pocketsize.recipes.quantize import Gptq, Hqq, Rtn
from pocketsize.recipes.smooth import SmoothQuant
from pocketsize.recipes.step import Step

STEPS: Mapping[str, type[Step]] = MappingProxyType(
    {step.kind: step for step in (Rtn, Hqq, Awq, SmoothQuant, Gptq)}
)
