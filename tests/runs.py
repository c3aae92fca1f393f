"""Runs of a few steps on texts that a test writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pocketsize as ps
from pocketsize.recipes.recipe import Data
from quiet import Quiet
from tiny import write_texts


def ran(
    source: Path, out: Path, *steps: Any, export: tuple[str, ...] = ("folder",), sequences: int = 4
) -> Any:
    """The result of these steps; their texts lie beside the output."""
    calibrate, evaluate = write_texts(out.parent)
    data = Data((calibrate,), (evaluate,), sequences=sequences, length=32, tokens=256, written=0.0)
    how = {"export": list(export), "data": data, "console": Quiet(), "dtype": "fp32"}
    return ps.run(source, list(steps), out=out, **how)
