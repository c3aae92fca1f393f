"""Matrices that read the same, as step `prune` makes them, and what a pruned model can become."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.errors import UsageError
from pocketsize.linalg import Factor
from pocketsize.models.model import Model
from pocketsize.pruning.alps import alps
from pocketsize.pruning.mask import Scope, highest, zeros_of
from pocketsize.pruning.pattern import Pattern
from pocketsize.pruning.score import magnitude, surgeon, wanda
from pocketsize.pruning.sparsegpt import sparsegpt
from pocketsize.pruning.support import refit
from pocketsize.pruning.threshold import edge_of
from pocketsize.recipes.record import Finding, LayerReport

if TYPE_CHECKING:
    from pocketsize.recipes.prune import Prune

# So many more zeros than were asked for, as a share of the weights, are told.
MORE = 0.005
# What a model's own weights leave of a mask: where they are not zero; None if it is not pruned.
There = Bool[Tensor, "out in"] | None
# The mask of a linear, by its name and weights.
MaskOf = Callable[[str, Tensor], Tensor]
# The scope of weights that compete with those of all linears.
MODEL = "model"


def there_of(W: Tensor, model: Model) -> There:
    """Where a linear of a pruned model is not zero: what may stay; None if it is not pruned."""
    return None if model.pattern is None else W != 0


def require_no_revival(step: Prune, model: Model, decided: Mapping[str | None, Sequence[str]]) -> None:
    """Refuse a share below that of a model that is pruned already: its zeros stay.

    Where its linears differ, nothing says how many zeros those have that an override names.
    """
    if model.pattern is None:
        return
    has, near = model.pattern.sparsity, 1e-6
    said = f"of the model's weights {has:g} are zero ({model.pattern.name}) and stay so"
    if decided[None] and step.wanted.sparsity < has - near:
        word = f"sparsity {step.sparsity:g}" if not step.wanted.of else f"pattern {step.pattern}"
        raise UsageError(f"prune: {word}: {said}; ask for {has:g} or more")
    if decided[None] and step.allocation != "uniform" and step.sparsity - step.reach < has - near:
        spread = "a smaller spread, " if step.sparsity > has + near else ""
        raise UsageError(
            f"prune: allocation: {step.allocation} takes as little as {step.sparsity - step.reach:g} from "
            f"some linears, and {said}; use {spread}more sparsity, or allocation: uniform"
        )
    for pattern, share in step.overrides.items():
        if share is not None and decided[pattern] and share < has - near and not model.pattern.uneven:
            raise UsageError(f"prune: overrides: {pattern}: {share:g}: {said}; use {has:g} or more, or null")


def masks_within(model: Model, step: Prune) -> MaskOf:
    """What stays of each linear where the weights of all that are pruned compete."""
    names = [name for name in model.linears if step.pattern_for(name, {}) is not None]
    count = sum(math.prod(model.matrix_shape(name)) for name in names)
    edge = edge_of(
        lambda: (model.as_stored(name, model.weight(name)) for name in names), zeros_of(count, step.sparsity)
    )
    numbers = {name: i for i, name in enumerate(names)}
    return lambda name, W: edge.mask(W, numbers[name])


def more_zeros(step: Prune, model: Model, reports: Sequence[LayerReport]) -> Iterator[Finding]:
    """That a pruned model has more zeros than was asked for, since those that it had stay where they are."""
    if model.pattern is None:
        return
    weights = [report.rows * report.columns for report in reports]
    patterns = [step.pattern_for(report.name, {}) for report in reports]
    asked = sum(n * one.sparsity for n, one in zip(weights, patterns, strict=True) if one) / sum(weights)
    found = sum(n * (report.zeros or 0.0) for n, report in zip(weights, reports, strict=True)) / sum(weights)
    if found - asked > MORE:
        yield Finding(
            "zeros-kept",
            f"{found:.1%} of the weights are zero, and {asked:.1%} was asked for: all zeros stay that the "
            f"model had ({model.pattern.name}), those too that lie where fewer were asked for",
        )


def pruned_matrices(
    weights: Sequence[Tensor],
    there: Sequence[There],
    H: Float[Tensor, "in in"],
    pattern: Pattern,
    step: Prune,
    factor: Factor | None = None,
) -> Sequence[Tensor]:
    """Matrices that read the same as a step prunes them; `taylor` scores are taken elsewhere."""
    if step.score == "alps":
        rows = [len(W) for W in weights]
        known = [one for one in there if one is not None]
        own = torch.cat(known) if known else None
        how = {"scope": cast(Scope, step.scope), "damp": step.damp, "rounds": step.rounds}
        pruned = alps(torch.cat(list(weights)), H, pattern, rows=rows, there=own, **how).split(rows)
        if step.update == "auto":
            return pruned
        return [updated(W, X != 0, H, step, factor) for W, X in zip(weights, pruned, strict=True)]
    each = list(zip(weights, there, strict=True))
    if step.score == "sparsegpt" and step.update == "auto":
        return [sparsegpt(W, H, pattern, damp=step.damp, there=own, factor=factor) for W, own in each]
    return [updated(W, _mask(W, own, H, pattern, step, factor), H, step, factor) for W, own in each]


def updated(W: Tensor, mask: Tensor, H: Tensor, step: Prune, factor: Factor | None) -> Tensor:
    """The weights that a mask leaves, as the step wants them."""
    if step.update == "sweep":
        return sparsegpt(W, H, step.wanted, damp=step.damp, mask=mask, factor=factor)
    if step.update == "refit":
        damped = H.clone()
        damped.diagonal().add_(step.damp * H.diagonal().mean())
        return refit(W, mask, damped)
    return W * mask


def _mask(
    W: Tensor, there: There, H: Tensor, pattern: Pattern, step: Prune, factor: Factor | None
) -> Bool[Tensor, "out in"]:
    scope = cast(Scope, step.scope)
    if step.score == "sparsegpt":
        return sparsegpt(W, H, pattern, damp=step.damp, there=there, factor=factor) != 0
    scores = {
        "magnitude": lambda: magnitude(W),
        "wanda": lambda: wanda(W, H),
        "surgeon": lambda: surgeon(W, H, damp=step.damp, factor=factor),
    }
    return highest(scores[step.score](), pattern, scope, there=there)
