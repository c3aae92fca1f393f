"""The contestants of this benchmark."""

from __future__ import annotations

from contestants import FAST, GPTQMODEL, LLMCOMPRESSOR, ROUNDING

SIDES = (
    LLMCOMPRESSOR,
    GPTQMODEL,
    FAST,
    ROUNDING,
)
