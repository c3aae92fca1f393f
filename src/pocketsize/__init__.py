"""Pocketsize: a language model in, a small one out, with proof.

import pocketsize as ps
result = ps.shrink("sample:smollm2-135m", fit="80MB", target=["gguf"], out="small")
result.measurements["kl_mean"].value
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "Awq",
    "Data",
    "Distill",
    "Finetune",
    "Gate",
    "Gptq",
    "Gradual",
    "Hqq",
    "Layers",
    "Oats",
    "Plan",
    "Prune",
    "Qat",
    "Recipe",
    "Result",
    "Rotate",
    "Rtn",
    "SmoothQuant",
    "Source",
    "Student",
    "__version__",
    "distill",
    "finetune",
    "gated",
    "load",
    "plan",
    "prune",
    "quantize",
    "result",
    "run",
    "shrink",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Names of `pocketsize.api`, imported when first used: `import pocketsize` stays light."""
    if name in __all__:
        return getattr(importlib.import_module("pocketsize.api"), name)
    raise AttributeError(f"module 'pocketsize' has no attribute {name!r}")
