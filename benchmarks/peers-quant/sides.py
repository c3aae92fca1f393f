"""The contestants of this benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping

from contest import OURS, Side
from contestants import BALANCED, FAST, GPTQMODEL, HQQ, LLMCOMPRESSOR, NNCF, ROUNDING

LEARNED, TUNED = BALANCED.name, f"{OURS}-tuned"
_KEYS = {"learn": 50, "alpha": 0.25, "codes": False, "tokens": "128k", "batch": 2}
_WHOLE = {"step": {"qat": _KEYS}, "export": ["folder"]}
SIDES = (
    LLMCOMPRESSOR,
    GPTQMODEL,
    Side(
        "autoround",
        "side_autoround.py",
        ("auto-round==0.16.1",),
        {"ITERATIONS": "20"},
        dtype="float32",
        batch=8,
    ),
    NNCF,
    HQQ,
    FAST,
    BALANCED,
    Side(TUNED, "side_variant.py", environment={"VARIANT": json.dumps(_WHOLE)}),
    ROUNDING,
)
# What reads more text than the others, in windows.
MORE: Mapping[str, int] = {TUNED: 128}
# Sides that have the first seed alone: at every width another peer was better by far.
FIRST = (LLMCOMPRESSOR.name, GPTQMODEL.name, NNCF.name)
