"""How much of each linear is pruned, and which weights, where gradients decide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pocketsize.models.backward import Ends, Seen, backward_walk
from pocketsize.models.device import CPU
from pocketsize.models.model import Model
from pocketsize.models.walk import walk
from pocketsize.pruning.allocate import by_outliers, by_threshold, outlier_share, sketch
from pocketsize.pruning.bitmask import bits_of_rows, rows_of_bits
from pocketsize.pruning.mask import highest
from pocketsize.pruning.score import fisher, wanda
from pocketsize.recipes.step import Context, first_windows

if TYPE_CHECKING:
    from pocketsize.recipes.prune import Prune

ALLOCATIONS = ("uniform", "outliers", "taylor")
# Tokens of the calibration text whose gradients are looked at.
TOKENS = 4096
_SHARES = "shares"


def shares_of(step: Prune, model: Model, ctx: Context) -> tuple[Mapping[str, float], Mapping[str, Tensor]]:
    """The share of zeros of each linear without an override; masks by bits, where gradients choose them."""
    uniform = step.allocation == "uniform"
    if uniform and step.score != "taylor":
        return {}, {}
    own = [name for name in model.linears if step.pattern_for(name, {}) == step.wanted]
    if ctx.store.finished(_SHARES) is None:
        if step.allocation == "outliers":
            shares = _by_outliers(step, model, ctx, set(own))
            scores: dict[str, Tensor] = {}
        else:
            scores = _scores(model, ctx)
            sketches = {name: sketch(scores[name]) for name in own}
            weights = {name: math.prod(model.matrix_shape(name)) for name in own}
            shares = {} if uniform else by_threshold(sketches, weights, step.sparsity, step.spread)
        if step.score == "taylor" and not scores:
            scores = _scores(model, ctx)
        masks = _masks(step, model, scores, shares) if step.score == "taylor" else {}
        told = torch.tensor([shares.get(name, step.sparsity) for name in own], dtype=torch.float64)
        ctx.store.keep(_SHARES, {}, (), {_SHARES: told, **masks})
    kept = ctx.store.changed()
    shares = {} if uniform else dict(zip(own, kept[_SHARES].tolist(), strict=True))
    return shares, kept if step.score == "taylor" else {}


def mask_of(masks: Mapping[str, Tensor], name: str, columns: int) -> Tensor:
    """The mask of a linear."""
    return rows_of_bits(masks[f"{name}.mask"], columns)


def _masks(
    step: Prune, model: Model, scores: Mapping[str, Tensor], shares: Mapping[str, float]
) -> dict[str, Tensor]:
    """Masks by bits, of the linears that are pruned."""
    found: dict[str, Tensor] = {}
    for name, score in scores.items():
        if (pattern := step.pattern_for(name, shares)) is not None:
            scope = "row" if step.scope == "row" else "matrix"
            there = None if model.pattern is None else model.mask(name).to(score.device)
            found[f"{name}.mask"] = bits_of_rows(highest(score, pattern, scope, there=there))
    return found


def _by_outliers(step: Prune, model: Model, ctx: Context, own: set[str]) -> dict[str, float]:
    """Shares by block, from the outliers of Wanda's scores in the model as it is."""
    found: dict[str, list[float]] = {path: [] for path in model.blocks}
    for site in walk(model, ctx.input_ids, ctx.mask):
        if site.gram.tokens:
            H = site.gram.mean()
            found[site.block] += [outlier_share(wanda(W, H)) for W in site.weights]
    outliers = [sum(found[path]) / max(1, len(found[path])) for path in model.blocks]
    by_block = dict(zip(model.blocks, by_outliers(outliers, step.sparsity, step.spread), strict=True))
    return {name: by_block[path] for path in model.blocks for name in model.linears_of(path) if name in own}


def _scores(model: Model, ctx: Context) -> dict[str, Tensor]:
    """The Taylor score of every weight of every linear, from the model's own uncertainty."""
    text = first_windows(ctx, max(1, TOKENS // ctx.input_ids.shape[1]))
    found: dict[str, Tensor] = {}
    for _, seen in backward_walk(model, *text, seed=ctx.seed):
        if isinstance(seen, Ends):
            continue
        for name, one in seen.items():
            W = model.as_stored(name, model.weight(name))
            found[name] = _score(W, one).to(CPU)
    return found


def _score(W: Tensor, seen: Seen) -> Tensor:
    if not seen.inputs:  # an expert that no token reached
        return W.square()
    X, G = seen.joined()
    return fisher(W.to(X.device), X.float(), G.float())
