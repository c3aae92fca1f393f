"""The keys of a training in which narrow corrections learn instead of the matrices themselves."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import nn

from pocketsize.errors import UsageError
from pocketsize.models.model import Model
from pocketsize.training.lora import adapted, check_rank, narrow_parameters

# Corrections begin at zero and bear a higher rate than matrices.
FASTER = 3.0
# What a correction is multiplied by where nothing is named: alpha over rank.
SCALE = 2.0


@dataclass(frozen=True)
class Adapted:
    """The keys of a training by low-rank corrections of all linears of the blocks, merged at its end.

    `lora` is their rank, `alpha` over it what they are multiplied by (null: twice the rank). Gradients and
    moments are then of few numbers, so a training takes little more memory than the model. A head for
    classes learns whole beside them.
    """

    lora: int | None = None
    alpha: float | None = None


def check_adapters(step: Adapted, kind: str) -> None:
    """Refuse corrections that are none."""
    if step.lora is not None and step.lora < 1:
        raise UsageError(f"{kind}: lora is the rank of corrections, at least 1, got {step.lora}")
    if step.alpha is not None and not 0 < step.alpha < math.inf:
        raise UsageError(f"{kind}: alpha must be above 0, got {step.alpha}")
    if step.alpha is not None and step.lora is None:
        raise UsageError(f"{kind}: alpha scales the corrections of lora; give lora, or leave it out")


def settle_adapters(step: Adapted, model: Model, kind: str) -> None:
    """Refuse corrections as wide as the matrices of this model."""
    if step.lora is not None:
        check_rank(model, step.lora, kind)


def learning(step: object, module: nn.Module, model: Model, seed: int) -> AbstractContextManager[object]:
    """While it is entered, what of a module is to learn can; then corrections are in its matrices."""
    if not isinstance(step, Adapted) or step.lora is None:
        return nullcontext()
    alpha = SCALE * step.lora if step.alpha is None else step.alpha
    return adapted(module, model, step.lora, alpha, seed)


def faster(step: object) -> float:
    """How much higher than that of matrices the learning rate is, where none is named."""
    return FASTER if isinstance(step, Adapted) and step.lora is not None else 1.0


def learned_parameters(step: object, model: Model) -> int:
    """How many numbers learn."""
    if isinstance(step, Adapted) and step.lora is not None:
        return narrow_parameters(model, step.lora)
    return model.origin.parameters
