"""GPTQ by Pocketsize on the peers' terms: integer zeros, embedding and head left alone.

The recipe step as a run uses it: each finished block is written to disk, which counts.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from meter import metered
from worker import hand_over, read_job

from pocketsize.models.load import load
from pocketsize.models.products import quick_products
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.step import Context

SCALE_BITS = 16


def main() -> None:
    job = read_job()
    model = load(job.model)
    ids = torch.from_numpy(np.load(job.calibration)[: job.sequences])
    step = Gptq(f"W{job.bits}A16", group=job.group, symmetric=False, embeddings=None).resolve(
        model, ("folder",)
    )
    with tempfile.TemporaryDirectory() as room:
        with metered() as cost, quick_products():
            journal = open_journal(Path(room) / "work", {})
            context = Context(ids, torch.ones_like(ids, dtype=torch.bool), journal, lambda *_: None)
            done = step.apply(model, context)
        dequantized = {name: weight.dequantize() for name, weight in done.quantized.items()}
    versions = {name: version(name) for name in ("transformers", "numba")}
    hand_over(job, cost, dequantized, scale_bits=SCALE_BITS, zero_bits=job.bits, versions=versions)


if __name__ == "__main__":
    main()
