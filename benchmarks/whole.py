"""A whole quantization, from a folder of shards to a written folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from pocketsize.exporting import compressed_tensors
from pocketsize.models.load import load
from pocketsize.models.products import quick_products
from pocketsize.recipes.grids import Quantizer
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.record import StepReport
from pocketsize.recipes.step import Context


def quantize(folder: Path, step: Quantizer, sequences: int, length: int) -> StepReport:
    """What the step reports; the quantized folder is written, then thrown away."""
    model = load(folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(model.config.vocab_size), (sequences, length), generator=generator)
    with tempfile.TemporaryDirectory(dir=folder.parent) as room:
        journal = open_journal(Path(room) / "work", {})
        context = Context(ids, torch.ones_like(ids, dtype=torch.bool), journal, lambda *_: None)
        with quick_products():
            done = step.resolve(model, ("folder",)).apply(model, context)
        (Path(room) / "out").mkdir()
        compressed_tensors.write(done, Path(room) / "out")
    return context.reports[-1]
