"""Every recipe step by the word a recipe uses for it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pocketsize.recipes.awq import Awq
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.quantize import Gptq, Hqq, Rtn
from pocketsize.recipes.smooth import SmoothQuant
from pocketsize.recipes.step import Step

STEPS: Mapping[str, type[Step]] = MappingProxyType(
    {step.kind: step for step in (Layers, Distill, Finetune, Rtn, Hqq, Awq, SmoothQuant, Gptq)}
)
