"""What a sweep aims at where it makes up for what was lost before, and where that cannot be."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.linalg import Factor, feedback_factor
from pocketsize.models.model import Model
from pocketsize.models.walk import Site
from pocketsize.quantization.drift import made_up_for
from pocketsize.recipes.rounds import rounding_word


def check_terms(kind: str, alpha: float, beta: float, words: Sequence[str]) -> None:
    """Refuse shares that mean nothing, and a drift that was never summed."""
    if not 0 <= alpha <= 1:
        raise UsageError(f"{kind}: alpha must lie between 0 and 1, got {alpha}")
    if not 0 <= beta < 1:
        raise UsageError(f"{kind}: beta must be at least 0 and below 1, got {beta}")
    if alpha and (word := rounding_word(words)) is not None:
        raise UsageError(f"{kind}: alpha: the original rounds no inputs, {word} does; use alpha: 0")


def refuse_experts(kind: str, alpha: float, model: Model) -> None:
    """Refuse to make up for what experts lack: they are given other tokens than in the original."""
    if alpha and model.arch.experts is not None:
        raise UnsupportedError(
            f"{kind}: alpha: experts of a {model.config.model_type} read other tokens than the original's, "
            "so nothing tells what they lack; use alpha: 0"
        )


def aims(
    site: Site, W: Float[Tensor, "out in"], *, alpha: float, sink: float, damp: float
) -> tuple[Float[Tensor, "out in"], Factor | None]:
    """What a sweep of all weights of a site aims at: themselves, unless the site knows what it lacks.

    Beside it the factor that this took, if any.
    """
    if site.drift is None or not site.drift.read.tokens:
        return W, None
    H, C = site.drift.read.mean(), site.drift.mean()
    if site.first_drift is not None:
        H = H + sink * site.first_drift.read.mean()
        C = C + sink * site.first_drift.mean()
    factor = feedback_factor(H, damp)
    return made_up_for(W, C, factor, alpha=alpha), factor
