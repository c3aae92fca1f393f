"""How much of each linear is pruned, and which weights, where gradients decide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from pocketsize.linalg import Gram
from pocketsize.models.backward import Ends, Seen, backward_walk
from pocketsize.models.device import CPU
from pocketsize.models.model import Model
from pocketsize.models.walk import walk
from pocketsize.pruning.allocate import by_outliers, by_threshold, evened, outlier_share, sketch
from pocketsize.pruning.bitmask import bits_of_rows, rows_of_bits
from pocketsize.pruning.mask import Scope, about, highest
from pocketsize.pruning.pattern import Pattern
from pocketsize.pruning.score import fisher, wanda
from pocketsize.pruning.support import refit
from pocketsize.quantization.allocate import Choice, allocate
from pocketsize.quantization.sensitivity import linear_cost
from pocketsize.recipes.overrides import decides
from pocketsize.recipes.pruned import There, there_of
from pocketsize.recipes.step import Context, first_windows

if TYPE_CHECKING:
    from pocketsize.recipes.prune import Prune

ALLOCATIONS = ("uniform", "outliers", "taylor", "searched")
# How far from the mean the share of a linear may lie. What gradients tell is worth following further.
SPREAD, SPREADS = 0.1, {"taylor": 0.2, "searched": 0.2}
# Tokens of the calibration text whose gradients are looked at.
TOKENS = 4096
# Shares that are tried of each linear, evenly over its range, and units in which what stays is counted.
LEVELS, UNITS = 5, 1 << 15
# Rounds of the refit in a search; one more or less hardly changes what comes of it.
REFITS = 2
_SHARES = "shares"


def shares_of(step: Prune, model: Model, ctx: Context) -> tuple[Mapping[str, float], Mapping[str, Tensor]]:
    """The share of zeros of each linear without an override; masks by bits, where gradients choose them."""
    own = [name for name in model.linears if decides(step.overrides, name) is None]
    allocation = step.allocation if own else "uniform"
    if allocation == "uniform" and step.score != "taylor":
        return {}, {}
    if ctx.store.finished(_SHARES) is None:
        shares: dict[str, float] = {}
        if allocation == "outliers":
            shares = _by_outliers(step, model, ctx, set(own))
        elif allocation == "searched":
            shares = _searched(step, model, ctx, set(own))
        scores = _scores(model, ctx) if "taylor" in (step.score, allocation) else {}
        if allocation == "taylor":
            sketches = {name: sketch(scores[name]) for name in own}
            weights = {name: math.prod(model.matrix_shape(name)) for name in own}
            shares = by_threshold(sketches, weights, step.sparsity, step.reach)
        masks = _masks(step, model, scores, shares) if step.score == "taylor" else {}
        told = torch.tensor([shares.get(name, step.sparsity) for name in own], dtype=torch.float64)
        ctx.store.keep(_SHARES, {}, (), {_SHARES: told, **masks})
    kept = ctx.store.changed()
    shares = {} if allocation == "uniform" else dict(zip(own, kept[_SHARES].tolist(), strict=True))
    return shares, kept if step.score == "taylor" else {}


def usual_spread(step: Prune, model: Model) -> float:
    """How far from the mean a share may lie by default: of a pruned model no further than zeros let it."""
    usual = SPREADS.get(step.allocation, SPREAD)
    more = usual if model.pattern is None else step.wanted.sparsity - model.pattern.sparsity
    return min(usual, more) if more > 0 else usual


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
    by_block = dict(zip(model.blocks, by_outliers(outliers, step.sparsity, step.reach), strict=True))
    return {name: by_block[path] for path in model.blocks for name in model.linears_of(path) if name in own}


def _searched(step: Prune, model: Model, ctx: Context, own: set[str]) -> dict[str, float]:
    """The shares at which the model loses least: each linear tried at a few, the best of all together.

    What a linear loses is KL to second order (`linear_cost`); a linear that no token reached has the mean.
    """
    levels = np.linspace(max(step.sparsity - step.reach, 0.01), min(step.sparsity + step.reach, 0.99), LEVELS)
    weights = {name: math.prod(model.matrix_shape(name)) for name in own}
    unit = max(1, sum(weights.values()) // UNITS)
    names, choices = list[str](), list[list[Choice]]()
    for name, W, seen in _observed(model, ctx):
        if name not in own or not _reached(seen):
            continue
        X, G = seen.joined()
        W, there = W.to(X.device), there_of(W, model)
        losses = [linear_cost(X, G, tried - W) for tried in _tried(W, X, levels, step, there)]
        kept = [round(weights[name] * (1 - level) / unit) for level in levels]
        names.append(name)
        choices.append([Choice(k, loss) for k, loss in zip(kept, losses, strict=True)])
    if not names:
        return {}
    total = sum(weights[name] for name in names)
    room = max(round(total * (1 - step.sparsity) / unit), sum(min(c.bytes for c in each) for each in choices))
    found = allocate(choices, room).chosen
    shares = {name: float(levels[k]) for name, k in zip(names, found, strict=True)}
    return dict.fromkeys(own, step.sparsity) | evened(shares, weights, step.sparsity)


def _tried(W: Tensor, X: Tensor, levels: Iterable[float], step: Prune, there: There) -> Iterator[Tensor]:
    """A matrix at several shares: cut by Wanda's scores, and refit where the step moves what stays."""
    gram = Gram.zeros(W.shape[1], X.device)
    gram.update(X)
    H = gram.mean()
    H.diagonal().add_(step.damp * H.diagonal().mean())
    score, scope = wanda(W, H), cast(Scope, step.scope)
    for level in levels:
        mask = about(score, Pattern(float(level)), scope, there=there)
        yield refit(W, mask, H, rounds=REFITS) if step.moves else W * mask


def _scores(model: Model, ctx: Context) -> dict[str, Tensor]:
    """The Taylor score of every weight of every linear, from the model's own uncertainty."""
    return {name: _score(W, seen).to(CPU) for name, W, seen in _observed(model, ctx)}


def _observed(model: Model, ctx: Context) -> Iterator[tuple[str, Tensor, Seen]]:
    """Every linear with what it saw of the first calibration windows, and its gradients there."""
    text = first_windows(ctx, max(1, TOKENS // ctx.input_ids.shape[1]))
    for _, seen in backward_walk(model, *text, seed=ctx.seed):
        if isinstance(seen, Ends):
            continue
        for name, one in seen.items():
            yield name, model.as_stored(name, model.weight(name)), one


def _reached(seen: Seen) -> bool:
    """Whether any token came to a linear: to an expert none may, or a batch that is empty."""
    return any(len(X) for X in seen.inputs)


def _score(W: Tensor, seen: Seen) -> Tensor:
    if not _reached(seen):
        return W.square()
    X, G = seen.joined()
    return fisher(W.to(X.device), X.float(), G.float())
