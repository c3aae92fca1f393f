"""Every recipe step by the word a recipe uses for it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

from pocketsize.recipes.awq import Awq
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.qat import Qat
from pocketsize.recipes.quantize import Gptq, Hqq, Rtn
from pocketsize.recipes.smooth import SmoothQuant
from pocketsize.recipes.step import Step
from pocketsize.recipes.student import Student

# Whether a student looks at the calibration tokens depends on its options, so it is no constant of the class.
_STUDENT = cast(type[Step], Student)
STEPS: Mapping[str, type[Step]] = MappingProxyType(
    {step.kind: step for step in (Layers, _STUDENT, Distill, Finetune, Rtn, Hqq, Awq, SmoothQuant, Gptq, Qat)}
)
