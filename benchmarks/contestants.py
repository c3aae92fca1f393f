"""Sides that several comparisons of quantizers have."""

from __future__ import annotations

import json
from collections.abc import Mapping

from contest import OURS, Side


def _balanced(steps: int) -> Side:
    """What `--effort balanced` does."""
    step = {"step": {"gptq": {"learn": steps, "alpha": 0.25}}, "export": ["folder"]}
    return Side(f"{OURS}-balanced", "side_variant.py", environment={"VARIANT": json.dumps(step)}, revision=2)


LLMCOMPRESSOR = Side("llmcompressor", "side_llmcompressor.py", ("llmcompressor==0.14.0.1",))
GPTQMODEL = Side(
    "gptqmodel",
    "side_gptqmodel.py",
    ("gptqmodel==7.6.0",),
    # With fewer workers than two it does not start on a machine of two cores.
    {"GPTQMODEL_CPU_WORKERS": "2"},
    warm_up=True,
)
NNCF = Side("nncf", "side_nncf.py", ("nncf==3.4.0", "transformers"), dtype="float32")
HQQ = Side("hqq", "side_hqq.py", ("hqq==0.2.8.post1", "transformers"), dtype="float32", calibrated=False)
FAST = Side(OURS, "side_ours.py", revision=2)
BALANCED, BALANCED_ENCODER = _balanced(20), _balanced(80)
ROUNDING = Side("rounding", "side_rounding.py", dtype="float32", calibrated=False)
# Of sides that do not have every width.
WIDTHS: Mapping[str, tuple[int, ...]] = {NNCF.name: (4,)}
