"""Blocks behind which a model may stop: their numbers, and the keys of a training that prepares them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.models.body import body_of
from pocketsize.models.exits import LAST_NORM
from pocketsize.models.model import Model
from pocketsize.recipes.step import Auto
from pocketsize.training.early import Early

# So many, where none are named.
EXITS = 4
Numbers = tuple[int, ...] | Auto


@dataclass(frozen=True)
class Shallow:
    """The keys of a training in which a model learns to say behind earlier blocks what it says in the end.

    `exits` are the numbers of those blocks, from 0, `auto` for four spread over the second half; `early` is
    what the loss behind them counts. Each batch teaches one of them beside the end.
    """

    exits: tuple[int, ...] | Auto | None = None
    early: float = 1.0


def check_shallow(step: Shallow, kind: str) -> None:
    """Refuse exits that are none."""
    if isinstance(step.exits, list):
        object.__setattr__(step, "exits", tuple(step.exits))
    if not 0 < step.early < math.inf:
        raise UsageError(f"{kind}: early must be above 0, got {step.early}; leave exits out for none")
    if step.exits is None and step.early != 1.0:
        raise UsageError(f"{kind}: early is what the loss behind exits counts; name exits, or leave it out")
    if step.exits is not None:
        check_exits(step.exits, kind)


def check_exits(exits: Numbers, kind: str) -> None:
    """Refuse numbers that are no list of blocks."""
    if exits == "auto":
        return
    if not isinstance(exits, tuple):
        raise UsageError(f"{kind}: exits is auto or a list of numbers of blocks, got {exits!r}")
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in exits)
    if not exits or not whole or list(exits) != sorted({*exits}):
        raise UsageError(f"{kind}: exits lists numbers of blocks, rising, each once; got {list(exits)}")


def settled_exits(exits: Numbers, model: Model, kind: str) -> tuple[int, ...]:
    """The numbers for this model; refuses blocks that it has not, or that nothing stands behind."""
    count = len(model.blocks)
    if count < 2:
        raise UsageError(f"{kind}: exits: the model has one block, so there is nothing to leave out")
    if exits == "auto":
        first, last = (count - 1) // 2, count - 2
        return tuple(sorted({max(0, first + round((last - first) * i / EXITS)) for i in range(EXITS)}))
    if exits[-1] >= count - 1:
        raise UsageError(
            f"{kind}: exits: {exits[-1]}; the model has {count} blocks (from 0), and behind the last there "
            "is nothing to leave out"
        )
    return exits


def settle_shallow(step: Shallow, model: Model, kind: str) -> tuple[int, ...] | None:
    """The exits of a training of this model."""
    if step.exits is None:
        return None
    if model.arch.task != "generate":
        raise UnsupportedError(
            f"{kind}: exits: {model.config.model_type} predicts no tokens; keep fewer blocks (layers) instead"
        )
    parent = model.blocks[0].rpartition(".")[0].rpartition(".")[0]
    if f"{parent}.{LAST_NORM}.weight" not in model.checkpoint.entries:
        raise UnsupportedError(
            f"{kind}: exits: a {model.config.model_type} has no {parent}.{LAST_NORM} to read at exits; "
            "leave exits out"
        )
    return settled_exits(step.exits, model, kind)


def early_of(step: Shallow, model: Model, module: nn.Module) -> Early | None:
    """What a training is told of the exits of a resolved step."""
    if step.exits is None or step.exits == "auto":
        return None
    paths = tuple(model.blocks[number] for number in step.exits)
    return Early(paths, body_of(module).get_submodule(LAST_NORM), step.early)
