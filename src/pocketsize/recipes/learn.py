"""Codes and scales of a block, learned from what the original block gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from pocketsize.models.attention import LearningPanels
from pocketsize.models.batches import HELD_OUT, batches_of, windows_per_batch
from pocketsize.models.device import CPU
from pocketsize.models.model import Model
from pocketsize.models.walk import Site, Whole
from pocketsize.quantization.learned import Learned, hardens, softness
from pocketsize.recipes.record import Finding
from pocketsize.recipes.step import Unit


def judging_windows(mask: Bool[Tensor, "n length"]) -> list[int]:
    """The numbers of the calibration windows that judge what others teach: every fourth batch."""
    judges = batches_of(mask)[HELD_OUT - 1 :: HELD_OUT]
    return [number for rows, _ in judges for number in range(rows.start, rows.stop)]


def too_little_to_learn(kind: str, mask: Bool[Tensor, "n length"], *, what: str = "learned") -> Finding:
    """What is said where no batch is left to judge what others teach."""
    count, needed = len(batches_of(mask)), HELD_OUT * windows_per_batch(mask.shape[1])
    said = f"every {HELD_OUT}th batch of calibration windows judges; of {count} batches none does"
    way = f"give {needed} (sequences)"
    return Finding("few-windows", f"{kind}: {said}: nothing was {what}; {way}", "")


def learn_block(site: Site, unit: Unit, model: Model, *, steps: int) -> None:
    """Learn the quantized linears of a block together, a batch of windows a step; kept if it helps.

    Three of four batches teach. What was learned is kept only if the block is nearer to the original's
    on the others; every fourth batch judges, so with fewer than that nothing is learned.
    """
    whole = site.whole
    assert whole is not None
    judges = range(HELD_OUT - 1, len(whole.calls), HELD_OUT)
    device = site.weights[0].device
    learned = {n: Learned(model.matrix(n).to(device), q.to(device)) for n, q in unit.weights.items()}

    def put(share: float = 0.0) -> dict[str, torch.Tensor]:
        """Give the block its matrices, soft to this share where they harden; its parameters by name."""
        found: dict[str, torch.Tensor] = {}
        for name, one in learned.items():
            W = model.as_stored(name, one.soft(share if hardens(unit.weights[name].scheme) else 0.0))
            found[name] = whole.put(name.removeprefix(f"{site.block}."), W)
        return found

    put()
    before = judged(whole, judges)
    teachers = [number for number in range(len(whole.calls)) if number not in judges]
    _teach(whole, model, learned, put, order_of(teachers, steps))
    put()
    after = judged(whole, judges)
    share = 1.0
    if after < before:
        share = after / before
        unit.weights = {name: one.weight().to(CPU) for name, one in learned.items()}
    unit.reports = [replace(report, learned=share) for report in unit.reports]
    site.replaced |= {name: weight.to(device).dequantize() for name, weight in unit.weights.items()}


def _teach(
    whole: Whole,
    model: Model,
    learned: dict[str, Learned],
    put: Callable[[float], dict[str, torch.Tensor]],
    order: Sequence[int],
) -> None:
    """One step for each batch in `order`."""
    for step, number in enumerate(order):
        parameters = {
            name: parameter.requires_grad_() for name, parameter in put(softness(step, len(order))).items()
        }
        with torch.enable_grad(), LearningPanels():
            whole.loss(number).backward()
        for name, one in learned.items():
            gradient = parameters[name].grad
            if gradient is None:  # an expert that no token of this batch reached has none
                continue
            gradient = model.as_stored(name, gradient)
            if model.pattern is not None:
                gradient = gradient * model.mask(name).to(gradient.device)
            one.update(gradient, step, len(order))


def order_of(numbers: Sequence[int], steps: int) -> list[int]:
    """So many of the numbers, each round of all of them in a random order of its own."""
    generator, order = torch.Generator().manual_seed(0), list[int]()
    while len(order) < steps:
        order += [numbers[i] for i in torch.randperm(len(numbers), generator=generator).tolist()]
    return order[:steps]


@torch.no_grad()
def judged(whole: Whole, numbers: Sequence[int]) -> float:
    """The mean loss of these batches."""
    return sum(float(whole.loss(number)) for number in numbers) / len(numbers)
