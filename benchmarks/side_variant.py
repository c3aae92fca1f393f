"""A recipe step of Pocketsize, as the variable VARIANT says it: `{"step": {...}, "export": [...]}`."""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from meter import metered
from worker import hand_over, read_job

from pocketsize.models.load import load
from pocketsize.recipes.grids import Quantizer, block_scheme
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.recipe import parse_step
from pocketsize.recipes.step import Context


def main() -> None:
    job, variant = read_job(), json.loads(os.environ["VARIANT"])
    model = load(job.model)
    ids = torch.from_numpy(np.load(job.calibration)[: max(1, job.sequences)])
    ((kind, options),) = variant["step"].items()
    options |= {"scheme": f"W{job.bits}A16", "group": job.group, "symmetric": False, "embeddings": None}
    step = parse_step({kind: options}).resolve(model, tuple(variant["export"]))
    assert isinstance(step, Quantizer)
    with tempfile.TemporaryDirectory() as room:
        with metered() as cost:
            journal = open_journal(Path(room) / "work", {})
            context = Context(ids, torch.ones_like(ids, dtype=torch.bool), journal, lambda *_: None)
            done = step.apply(model, context)
        weights = {name: weight.dequantize() for name, weight in done.quantized.items()}
        weights |= {name: done.weight(name) for name in done.changed}
    zeros = 16 if block_scheme(step).float_zeros else job.bits
    versions = {name: version(name) for name in ("transformers", "numba")}
    hand_over(job, cost, weights, scale_bits=16, zero_bits=zeros, versions=versions)


if __name__ == "__main__":
    main()
