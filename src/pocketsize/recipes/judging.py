"""By which text a training is judged, and what its loss is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import nn

from pocketsize.errors import UsageError
from pocketsize.models.device import working_device
from pocketsize.training.examples import Examples, Order
from pocketsize.training.objective import Objective

# Of the examples, what judges where a training may end early; so many batches at most.
HELD_OUT, JUDGES = 0.05, 8
# Where nothing is held out, so many batches that teach tell whether a training made anything worse.
SEEN = 4
# The keys that say what a loss is made of.
TERMS = ("soft", "hard", "pairs", "hidden", "cosine", "attention", "relations", "early", "temperature")


class Judged(Protocol):
    """The keys of a training that say how it is judged."""

    @property
    def patience(self) -> int:
        """Looks without progress after which it ends."""
        ...

    @property
    def batch(self) -> int:
        """Examples in a batch."""
        ...


def held_out(examples: Examples, step: Judged, seed: int) -> tuple[Examples, Examples | None]:
    """The examples that teach, and those that judge where a training may end early."""
    if not step.patience:
        return examples, None
    count = min(JUDGES * step.batch, max(1, round(HELD_OUT * len(examples))))
    if count >= len(examples):
        raise UsageError(f"patience: {len(examples)} examples are too few to hold some out; use patience: 0")
    rows = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return examples.part(sorted(rows[count:])), examples.part(sorted(rows[:count]))


def first_rows(order: Order, batches: int | None) -> list[int]:
    """The rows of the first batches of a training of so many."""
    return sorted({row for number in range(min(SEEN, batches or SEEN)) for row in order.rows(number)})


def judging(module: nn.Module, objective: Objective, judges: Examples, batch: int) -> Callable[[], float]:
    """What gives the mean loss of these examples, as the module is then."""
    rows = [range(a, min(a + batch, len(judges))) for a in range(0, len(judges), batch)]

    @torch.no_grad()
    def judge() -> float:
        module.eval()
        total = count = 0.0
        for part in (replace(judges.batch(list(r)), turn=i).to(working_device()) for i, r in enumerate(rows)):
            items = objective.count(part)
            total, count = total + items * float(objective.loss(part)), count + items
        module.train()
        return total / max(1.0, count)

    return judge


def terms_of(step: Any) -> str:
    """What the loss of a step is made of: its keys that are not at their defaults."""
    own = {field.name: field.default for field in fields(step) if field.name in TERMS}
    said = [f"{key}: {getattr(step, key):g}" for key in own if getattr(step, key) != own[key]]
    return ", ".join(said) or "the model and its text"
