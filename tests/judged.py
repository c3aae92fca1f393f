"""Calibration windows of which every fourth batch judges what the others teach (fixture `small_batches`)."""

from __future__ import annotations

from pathlib import Path

import torch

from pocketsize.models.model import Model
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.step import Context
from tiny import VOCAB

LENGTH = 40


def context(folder: Path, windows: int = 16, *, padded: bool = False) -> Context:
    ids = torch.randint(5, VOCAB - 1, (windows, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[::3, 25:] = False
    return Context(ids, mask, open_journal(folder, {}), lambda *_: None)


def applied(model: Model, ctx: Context, step: Gptq) -> Model:
    return step.resolve(model, ("folder",)).apply(model, ctx)
