"""The contestants of this benchmark."""

from __future__ import annotations

from contest import OURS, Side

LENGTH = 512
SIDES = (
    Side("llmcompressor", "llmcompressor_side.py", ("llmcompressor==0.14.0.1",)),
    Side(
        "gptqmodel",
        "gptqmodel_side.py",
        ("gptqmodel==7.6.0",),
        # With fewer workers than two it does not start on a machine of two cores.
        {"GPTQMODEL_CPU_WORKERS": "2"},
    ),
    Side(OURS, "ours_side.py"),
    Side("rounding", "rounding_side.py", dtype="float32", calibrated=False),
)
