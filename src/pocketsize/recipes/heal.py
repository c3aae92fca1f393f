"""What a cut lacks is made up for by least squares, linear by linear; kept only if the model comes nearer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pocketsize.errors import UnsupportedError
from pocketsize.io.checkpoint import TensorSpec, open_file, write_safetensors
from pocketsize.measurement.suite import divergence
from pocketsize.models.batches import HELD_OUT, full_windows
from pocketsize.models.device import CPU
from pocketsize.models.lockstep import Pair, lockstep
from pocketsize.models.model import Model
from pocketsize.models.surgery import writers_of
from pocketsize.pruning.heal import healed
from pocketsize.recipes.journal import StoredTensors
from pocketsize.recipes.record import Finding, Stage
from pocketsize.recipes.step import Auto, Context, Place, first_windows

Heal = bool | Auto
# Windows that linears are solved on at most. One in SHARE of all, JUDGES at most, judges the whole model and
# nothing else.
WINDOWS = 32
SHARE, JUDGES = 8, 8
_DONE = "done"


@dataclass(frozen=True, slots=True)
class Healing:
    """The tensors that healing changed, none if it was dropped, and how far off the model was and is."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()


def chosen(heal: Heal, model: Model, kind: str) -> bool:
    """Whether a cut of this model is healed; refuses it where nothing could be made up for."""
    if heal is True and model.pattern is not None:
        raise UnsupportedError(f"{kind}: heal: the zeros of a pruned model stay; cut first, then prune")
    if heal is True and (why := beyond(model, kind)):
        raise UnsupportedError(f"{kind}: heal: {why}; use heal: false")
    return heal is not False and model.pattern is None and not beyond(model, kind)


def beyond(model: Model, kind: str) -> str:
    """Why nothing could make up for what such a cut leaves out, empty where something can.

    For slices each linear can, for blocks those that add to what passes them.
    """
    family = model.config.model_type
    if model.arch.cuts is None:
        return f"it is not known which linears of a {family} write to what passes its blocks"
    if kind == "student":
        return ""
    if model.arch.experts is not None:
        return f"experts, which add what a block of a {family} does, are given other tokens once blocks go"
    if not writers_of(model):
        return f"norms stand behind what a block of a {family} adds"
    return ""


def unhealed(model: Model, kind: str) -> list[Finding]:
    """What a user should know of a cut that is not healed."""
    why = beyond(model, kind)
    return [Finding("not-healed", f"{kind}: nothing makes up for what is gone: {why}")] if why else []


def heal(pair: Pair, ctx: Context, key: str) -> Healing:
    """The smaller model with its linears solved anew, block by block, if that brings it nearer.

    Finished blocks lie in the place of this name until the model is made.
    """
    windows = full_windows(ctx.mask)
    judging = min(JUDGES, max(1, windows // SHARE))
    held = first_windows(ctx, judging)
    ids, mask = (part[len(held[0]) :] for part in first_windows(ctx, judging + WINDOWS))
    if windows - judging < HELD_OUT:
        said = f"one calibration window judges and {HELD_OUT} teach at least; there are {windows}"
        ctx.findings.append(Finding("few-windows", f"{said}: nothing was healed", ""))
        return Healing()
    place, new = ctx.store.place(key), dict[str, Tensor]()
    for fit in lockstep(pair, ids, mask, finished=partial(_finished, place)):
        done = healed(fit.teach, fit.judge)
        if done.damp:
            fit.changed = fit.weights + done.change
            new |= {name: T.to(CPU) for name, T in fit.tensors().items()}
        if fit.last:
            _keep(place, fit.block, new)
            new.clear()
            blocks = pair.cut.blocks
            ctx.progress(blocks.index(fit.block) + 1, len(blocks), f"healed {fit.block}")
    tensors = _laid([_file(place, path) for path in pair.cut.blocks])
    ways = (pair.cut, replace(pair.cut, changed=tensors))
    before, after = (divergence(pair.original, one, *held) for one in ways)
    better = after < before
    stages = (Stage("cut", before, kept=not better), Stage("healed", after, kept=better))
    return Healing(tensors if better else {}, stages)


def findings_of(stages: Sequence[Stage], kind: str) -> list[Finding]:
    """What a user should know of a healing."""
    if not stages or stages[-1].kept:
        return []
    said = f"{kind}: solved anew the model is no nearer to the whole one than cut, so nothing was changed"
    return [Finding("healing-dropped", f"{said}; give more calibration text")]


def _file(place: Place, block: str) -> Path:
    return place.folder / f"{block}.safetensors"


def _finished(place: Place, block: str) -> Mapping[str, Tensor] | None:
    """What healing changed of a block, if it is durable."""
    file = _file(place, block)
    place.safe_point(f"before {block}")
    return _laid([file]) if file.is_file() else None


def _keep(place: Place, block: str, new: Mapping[str, Tensor]) -> None:
    told = {**new, _DONE: torch.ones(1)}  # a file without any tensor is none
    specs = [TensorSpec(n, T.dtype, tuple(T.shape), lambda T=T: T) for n, T in sorted(told.items())]
    write_safetensors(_file(place, block), specs, {})
    place.safe_point(f"after {block}")


def _laid(files: Sequence[Path]) -> StoredTensors:
    """What these files hold, as far as they are there; tensors stay on disk."""
    there = [file for file in files if file.is_file()]
    return StoredTensors({name: file for file in there for name in open_file(file).entries if name != _DONE})
