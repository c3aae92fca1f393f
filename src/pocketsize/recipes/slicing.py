"""How a student is cut from its teacher: which slices stay, and what is left of them, solved anew."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pocketsize.distillation.slices import added
from pocketsize.models.importance import slice_importance
from pocketsize.models.left_out import head_losses
from pocketsize.models.lockstep import Pair
from pocketsize.models.model import Model
from pocketsize.models.surgery import Selection, Sizes, cut_tensor, laid, selection, sizes_of, watched
from pocketsize.models.taylor import slice_costs
from pocketsize.recipes import heal as healing
from pocketsize.recipes.body import GRADED, WINDOWS, measured_windows
from pocketsize.recipes.record import Stage
from pocketsize.recipes.step import Context, first_windows

IMPORTANCES = ("activation", "taylor", "kl")
# What healing gave, beside the student.
STAGES = "stages.json"


def selected(
    importance: str, model: Model, ctx: Context, sizes: Sizes, tokens: Sequence[int] | None
) -> Selection:
    """The slices that stay, by this importance on the calibration text."""
    own = sizes_of(model) if model.arch.cuts is not None else sizes
    names = watched(model, sizes) if model.arch.cuts is not None else {}
    text = first_windows(ctx, WINDOWS)
    if not names or own == sizes:
        return selection(model, sizes, {}, tokens)
    if importance == "activation":
        return selection(model, sizes, slice_importance(model, *text, names), tokens)
    seen = slice_costs(model, *first_windows(ctx, GRADED), names, seed=ctx.seed)
    if importance == "kl":
        seen |= head_losses(model, *measured_windows(ctx), sizes)
    return selection(model, sizes, seen, tokens, together=added)


def healed(model: Model, ctx: Context, sizes: Sizes, chosen: Selection, key: str) -> healing.Healing:
    """What is left of the body solved anew; all tokens are still there meanwhile."""
    whole, body = replace(chosen, tokens=None), replace(sizes, vocabulary=sizes_of(model).vocabulary)
    pair = Pair(model, laid(model, body, whole), tuple(range(len(model.blocks))), whole)
    return healing.heal(pair, ctx, key)


def tensor(model: Model, name: str, chosen: Selection) -> torch.Tensor:
    """What stays of a tensor; one of a block that was solved anew has its shape already."""
    return model.weight(name) if name in model.changed else cut_tensor(model, name, chosen)


def stages_of(folder: Path) -> tuple[Stage, ...]:
    """What healing gave, if the student was healed."""
    if not (folder / STAGES).is_file():
        return ()
    return tuple(Stage(**one) for one in json.loads((folder / STAGES).read_bytes()))
