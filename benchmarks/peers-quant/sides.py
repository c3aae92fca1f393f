"""The contestants of this benchmark, and the widths that each has."""

from __future__ import annotations

import json
from collections.abc import Mapping

from contest import OURS, Side

LEARNED = f"{OURS}-balanced"
_STEP = {"step": {"gptq": {"learn": 20, "alpha": 0.25}}, "export": ["folder"]}
TUNED = f"{OURS}-tuned"
_KEYS = {"learn": 50, "alpha": 0.25, "codes": False, "tokens": "128k", "batch": 2}
_WHOLE = {"step": {"qat": _KEYS}, "export": ["folder"]}
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
    Side(
        "autoround",
        "side_autoround.py",
        ("auto-round==0.16.1",),
        {"ITERATIONS": "20"},
        dtype="float32",
        batch=8,
    ),
    Side("nncf", "side_nncf.py", ("nncf==3.4.0", "transformers"), dtype="float32"),
    Side("hqq", "side_hqq.py", ("hqq==0.2.8.post1", "transformers"), dtype="float32", calibrated=False),
    Side(OURS, "side_ours.py", revision=2),
    Side(LEARNED, "side_variant.py", environment={"VARIANT": json.dumps(_STEP)}, revision=2),
    Side(TUNED, "side_variant.py", environment={"VARIANT": json.dumps(_WHOLE)}),
    Side("rounding", "side_rounding.py", dtype="float32", calibrated=False),
)
# What reads more text than the others, in windows.
MORE: Mapping[str, int] = {TUNED: 128}
# Sides that do not have every width.
WIDTHS: Mapping[str, tuple[int, ...]] = {"nncf": (4,)}
# Sides that have the first seed alone: at every width another peer was better by far.
FIRST = ("llmcompressor", "gptqmodel", "nncf")
