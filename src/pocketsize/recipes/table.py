"""Every recipe step by the word a recipe uses for it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

from pocketsize.recipes.awq import Awq
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.gate import Gate
from pocketsize.recipes.gradual import Gradual
from pocketsize.recipes.oats import Oats
from pocketsize.recipes.prune import Prune
from pocketsize.recipes.qat import Qat
from pocketsize.recipes.quantize import Gptq, Hqq, Rtn
from pocketsize.recipes.rotate import Rotate
from pocketsize.recipes.smooth import SmoothQuant
from pocketsize.recipes.step import Step
from pocketsize.recipes.student import Student

# Whether these look at the calibration tokens depends on their options, so it is no constant of the class.
_STUDENT, _PRUNE = cast(type[Step], Student), cast(type[Step], Prune)
_QUANTIZERS: tuple[type[Step], ...] = (Rtn, Hqq, Awq, SmoothQuant, Gptq, Qat)
STEPS: Mapping[str, type[Step]] = MappingProxyType(
    {
        step.kind: step
        for step in (Layers, _STUDENT, Rotate, _PRUNE, Oats, Distill, Finetune, Gate, Gradual, *_QUANTIZERS)
    }
)
