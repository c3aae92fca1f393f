"""Quantize a folder, and write down what it took: `worker.py SMALL FOLDER RESULT STEP SEQUENCES LENGTH`.

A small model goes first: what is imported and compiled counts neither as time nor as memory.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

from meter import forget_peak, metered, write_json
from whole import quantize

from pocketsize.models.dtype import forward_dtype
from pocketsize.recipes.grids import Quantizer
from pocketsize.recipes.recipe import parse_step


def main() -> None:
    small, folder, result = map(Path, sys.argv[1:4])
    step, (sequences, length) = parse_step(json.loads(sys.argv[4])), map(int, sys.argv[5:])
    assert isinstance(step, Quantizer)
    quantize(small, step, sequences, length)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    with metered() as cost:
        report = quantize(folder, step, sequences, length)
    stages = [stage.name for stage in report.stages]
    facts = {"matrices": len(report.layers), "stages": stages, "number_bytes": forward_dtype().itemsize}
    write_json(result, facts | cost.as_dict())


if __name__ == "__main__":
    main()
