"""Steps of Pocketsize, as the variable STEPS says them: a list as in a recipe."""

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
from pocketsize.models.products import quick_products
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.recipe import parse_step
from pocketsize.recipes.step import Context


def main() -> None:
    job = read_job()
    model = original = load(job.model)
    ids = torch.from_numpy(np.load(job.calibration)[: job.sequences])
    with tempfile.TemporaryDirectory() as room:
        with metered() as cost, quick_products():
            journal = open_journal(Path(room) / "work", {})
            mask = torch.ones_like(ids, dtype=torch.bool)
            context = Context(ids, mask, journal, lambda *_: None, original=original)
            for raw in json.loads(os.environ["STEPS"]):
                model = parse_step(raw).resolve(model, ("folder",)).apply(model, context)
        weights = {name: model.weight(name) for name in model.linears}
    versions = {name: version(name) for name in ("transformers", "numba")}
    hand_over(job, cost, weights, scale_bits=0, zero_bits=0, versions=versions)


if __name__ == "__main__":
    main()
