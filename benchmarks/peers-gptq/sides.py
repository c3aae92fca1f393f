"""The contestants of this benchmark."""

from __future__ import annotations

from contest import OURS, Side

SIDES = (
    Side("llmcompressor", "side_llmcompressor.py", ("llmcompressor==0.14.0.1",)),
    Side(
        "gptqmodel",
        "side_gptqmodel.py",
        ("gptqmodel==7.6.0",),
        # With fewer workers than two it does not start on a machine of two cores.
        {"GPTQMODEL_CPU_WORKERS": "2"},
        warm_up=True,
    ),
    Side(OURS, "side_ours.py", revision=2),
    Side("rounding", "side_rounding.py", dtype="float32", calibrated=False),
)
