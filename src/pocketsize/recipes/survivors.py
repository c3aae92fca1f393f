"""The weights that pruning leaves in a block, learned from what the original block gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pocketsize.models.attention import LearningPanels
from pocketsize.models.batches import HELD_OUT
from pocketsize.models.device import CPU
from pocketsize.models.model import Model
from pocketsize.models.walk import Site, Whole
from pocketsize.recipes.learn import judged, order_of
from pocketsize.recipes.step import Unit

# The largest step of a weight, as a share of the root mean square of its matrix.
RATE = 0.02


def learn_survivors(site: Site, unit: Unit, model: Model, *, steps: int) -> None:
    """Learn the pruned linears of a block together, a batch of windows a step; kept if it helps.

    Zeros stay. Three of four batches teach, the others judge (EBFT, arXiv:2402.12419, in that a block
    learns from its original's output).
    """
    whole = site.whole
    assert whole is not None
    device = site.weights[0].device
    start = {name: X.to(device) for name, X in unit.changed.items()}
    judges = range(HELD_OUT - 1, len(whole.calls), HELD_OUT)
    put(whole, site, model, start)
    before = judged(whole, judges)
    teachers = [number for number in range(len(whole.calls)) if number not in judges]
    learned = _taught(whole, site, model, start, order_of(teachers, steps))
    put(whole, site, model, learned)
    after = judged(whole, judges)
    share = 1.0
    if after < before:
        share = after / before
        unit.changed = {name: X.to(CPU) for name, X in learned.items()}
    unit.reports = [replace(report, learned=share) for report in unit.reports]
    site.replaced |= {name: X.to(device) for name, X in unit.changed.items()}


def put(whole: Whole, site: Site, model: Model, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a block these matrices; its parameters by name."""
    return {
        name: whole.put(name.removeprefix(f"{site.block}."), model.as_stored(name, X))
        for name, X in weights.items()
    }


def _taught(
    whole: Whole, site: Site, model: Model, start: dict[str, Tensor], order: Sequence[int]
) -> dict[str, Tensor]:
    """Adam on what is not zero, its rate falling to nothing."""
    X = {name: T.clone() for name, T in start.items()}
    kept = {name: T != 0 for name, T in start.items()}
    size = {name: float(T.square().mean().sqrt()) for name, T in start.items()}
    mean = {name: torch.zeros_like(T) for name, T in X.items()}
    power = {name: torch.zeros_like(T) for name, T in X.items()}
    seen = dict.fromkeys(X, 0)
    for step, number in enumerate(order):
        parameters = {name: p.requires_grad_() for name, p in put(whole, site, model, X).items()}
        with torch.enable_grad(), LearningPanels():
            whole.loss(number).backward()
        for name, p in parameters.items():
            if p.grad is None:  # an expert that no token of this batch reached has none
                continue
            g = model.as_stored(name, p.grad).float() * kept[name]
            seen[name] += 1
            mean[name].lerp_(g, 1 - 0.9)
            power[name].lerp_(g.square(), 1 - 0.99)
            m = mean[name] / (1 - 0.9 ** seen[name])
            v = power[name] / (1 - 0.99 ** seen[name])
            rate = RATE * size[name] * (1 - step / len(order))
            X[name] -= rate * m / v.sqrt().add(1e-12)
    return X
