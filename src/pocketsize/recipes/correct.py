"""What a sweep aims at where it makes up for what was lost before, and where that cannot be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.linalg import feedback_factor
from pocketsize.models.model import Model
from pocketsize.models.walk import Site
from pocketsize.quantization.drift import made_up_for
from pocketsize.recipes.rounds import rounding_word
from pocketsize.recipes.sites import UNREAD, naming, stacked, what_is_read
from pocketsize.recipes.step import Auto

# What the first position of every window counts beside all positions together, where it feeds attention.
SINK = 0.5
# The share of what was lost on the way to a linear that it makes up for, where weights are rounded.
ALPHA = 0.25
# The same where they become zero, and the damping of what finds it: with the 0.01 of sweeps it follows the
# calibration text too far (benchmarks/pruning).
LEFT_OUT, DAMPED = 0.5, 0.3


def check_terms(kind: str, alpha: float, beta: float, words: Sequence[str]) -> None:
    """Refuse shares that mean nothing, and a drift that was never summed."""
    if not 0 <= alpha <= 1:
        raise UsageError(f"{kind}: alpha must lie between 0 and 1, got {alpha}")
    if not 0 <= beta < 1:
        raise UsageError(f"{kind}: beta must be at least 0 and below 1, got {beta}")
    if alpha and (word := rounding_word(words)) is not None:
        raise UsageError(f"{kind}: alpha: the original rounds no inputs, {word} does; use alpha: 0")


def check_shares(kind: str, alpha: float | Auto, sink: float | Auto) -> None:
    """Refuse shares and counts that mean nothing, of a step that makes zeros."""
    check_sink(kind, decided(sink))
    check_terms(kind, decided(alpha), 0.0, ())


def decided(value: float | Auto) -> float:
    """A share or count of a step that is resolved; before, `auto` stands for none."""
    return 0.0 if value == "auto" else value


def settled(kind: str, alpha: float | Auto, model: Model, usual: float = LEFT_OUT) -> float:
    """The share that a step which makes zeros makes up for; `auto` is `usual`, or none where experts read."""
    if alpha == "auto":
        return 0.0 if model.arch.experts is not None else usual
    refuse_experts(kind, alpha, model)
    return alpha


def refuse_experts(kind: str, alpha: float, model: Model) -> None:
    """Refuse to make up for what experts lack: they are given other tokens than in the original."""
    if alpha and model.arch.experts is not None:
        raise UnsupportedError(
            f"{kind}: alpha: experts of a {model.config.model_type} read other tokens than the original's, "
            "so nothing tells what they lack; use alpha: 0"
        )


def check_sink(kind: str, sink: float) -> None:
    """Refuse what the first position cannot count."""
    if not 0 <= sink < math.inf:
        raise UsageError(f"{kind}: sink must be a number from 0 upwards, got {sink}")


@dataclass(frozen=True, slots=True)
class Aim:
    """What the linears of a site are to become, stacked in so many `rows` each, and what errors count.

    `objective` is the Gram matrix `read` with what the first position counts; `damp` and `escalations` are
    those of what found matrices that make up for something, 0 where they are the site's own.
    """

    whole: Float[Tensor, "out in"]
    rows: list[int]
    read: Float[Tensor, "in in"]
    objective: Float[Tensor, "in in"]
    damp: float = 0.0
    escalations: int = 0

    @property
    def matrices(self) -> tuple[Float[Tensor, "out in"], ...]:
        """One for each linear."""
        return self.whole.split(self.rows)

    def damped(self, escalations: int) -> dict[str, float]:
        """How the damping is told, if to aim took more of it than what came after."""
        more = self.escalations > escalations
        return {"damp": self.damp, "escalations": self.escalations} if more else {}


def aim_of(site: Site, *, alpha: float, sink: float, damp: float, unread: str = UNREAD) -> Aim:
    """What changes of a site's weights aim at: at themselves, unless the site knows what it lacks.

    Nearly every query attends to the first position (attention sinks, arXiv:2309.17453), so an error in its
    value reaches every token: it counts for more than its share of the tokens. `unread` is what a user can
    do about inputs that are all zero.
    """
    H = what_is_read(site, unread=unread)
    objective = H if site.first is None else H + sink * site.first.mean()
    W, rows = stacked(site), [len(W) for W in site.weights]
    if site.drift is None or not site.drift.read.tokens:
        return Aim(W, rows, H, objective)
    G, lost = site.drift.read.mean(), site.drift.lost(W)
    if site.first_drift is not None:
        G = G + sink * site.first_drift.read.mean()
        lost = lost + sink * site.first_drift.lost(W)
    with naming(site):
        factor = feedback_factor(G, damp)
    del G
    aim = made_up_for(W, lost, factor, alpha=alpha)
    return Aim(aim, rows, H, objective, factor.damp, factor.escalations)
