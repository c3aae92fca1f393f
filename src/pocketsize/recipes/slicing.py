"""How a student is cut from its teacher: which slices stay, and what is left of them, solved anew."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from pocketsize.distillation.slices import Importance, added, summed
from pocketsize.exporting.plain import CONFIG
from pocketsize.models.importance import slice_importance
from pocketsize.models.left_out import head_losses
from pocketsize.models.lockstep import Pair
from pocketsize.models.model import Model
from pocketsize.models.surgery import Selection, Sizes, cut_tensor, laid, selection, sizes_of, watched
from pocketsize.models.taylor import slice_costs
from pocketsize.recipes import heal as healing
from pocketsize.recipes.body import GRADED, WINDOWS, measured_windows
from pocketsize.recipes.record import Finding, Stage
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
        seen, together = slice_importance(model, *text, names), summed
    else:
        seen, together = slice_costs(model, *first_windows(ctx, GRADED), names, seed=ctx.seed), added
    ctx.findings += _idle(model, seen)
    if importance == "kl":
        seen |= head_losses(model, *measured_windows(ctx), sizes)
    return selection(model, sizes, seen, tokens, together=together)


def _idle(model: Model, seen: Mapping[str, Importance]) -> list[Finding]:
    """Which experts no token reached."""
    experts = [name for name in seen if model.arch.is_expert(name)]
    none = [name for name in experts if not seen[name].value().any()]
    said = f"{len(none)} of {len(experts)} experts saw no calibration token and were cut by their weights"
    return [Finding("experts-without-tokens", f"{said}; give more calibration text", none[0])] if none else []


def told_of_cut(model: Model, stages: Sequence[Stage], kind: str) -> list[Finding]:
    """What a user should know of a student that was cut from a model."""
    found, names = healing.findings_of(stages, kind), _other_heads(model)
    if names:
        said = f"{kind}: {len(names)} tensors of a head for another task stay behind"
        found.append(Finding("heads-dropped", said, names[0]))
    return found


def architectures(model: Model) -> list[str] | None:
    """How the config of a student names its class: as the model's, or the encoder's where a head stays."""
    if _other_heads(model):
        encoder: Any = transformers.MODEL_MAPPING[type(model.config)]
        return [encoder.__name__]
    names = json.loads((model.folder / CONFIG).read_bytes()).get("architectures")
    return None if names is None else [str(name) for name in names]


def _other_heads(model: Model) -> list[str]:
    """Tensors of heads for other tasks that lie beside a model; a student of it has none."""
    return [name for name in model.checkpoint.entries if model.arch.is_other_head(name)]


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
