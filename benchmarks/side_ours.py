"""GPTQ by Pocketsize on the peers' terms: integer zeros, embedding and head left alone."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import torch
from meter import metered
from worker import hand_over, read_job

from pocketsize.models.load import load
from pocketsize.models.walk import walk
from pocketsize.quantization.grid import QWeight
from pocketsize.recipes.quantize import Gptq, block_scheme, quantize_site

SCALE_BITS = 16


def main() -> None:
    job = read_job()
    model = load(job.model)
    ids = torch.from_numpy(np.load(job.calibration)[: job.sequences])
    step = Gptq(f"W{job.bits}A16", group=job.group, symmetric=False, embeddings=None).resolve(
        model, ("folder",)
    )
    weights: dict[str, QWeight] = {}
    with metered() as cost:
        for site in walk(model, ids, torch.ones_like(ids, dtype=torch.bool)):
            for name, weight, _ in quantize_site(site, block_scheme(step), step):
                weights[name] = weight
    dequantized = {name: weight.dequantize() for name, weight in weights.items()}
    versions = {name: version(name) for name in ("transformers", "numba")}
    hand_over(job, cost, dequantized, scale_bits=SCALE_BITS, zero_bits=job.bits, versions=versions)


if __name__ == "__main__":
    main()
