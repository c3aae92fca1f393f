"""The key of a training that hides a part of each text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.models.load import tokenizer_of
from pocketsize.models.model import Model
from pocketsize.recipes.training import Reading
from pocketsize.training.examples import Batch, Order
from pocketsize.training.masking import Masking


@dataclass(frozen=True)
class Masked:
    """The key of a training of encoders on texts of which a part is hidden, another at each reading.

    `masking` is the chance of each token that the tokenizer's mask stands in its place, for student and
    teachers alike.
    """

    masking: float = 0.0


def check_masking(step: Masked, kind: str) -> None:
    """Refuse a share that is none."""
    if not 0 <= step.masking < 1:
        raise UsageError(f"{kind}: masking is a share from 0 to below 1, got {step.masking}")


def settle_masking(step: Masked, model: Model, kind: str) -> None:
    """Refuse models that no token tells of a hidden one."""
    if not step.masking:
        return
    if model.arch.task == "generate":
        said = f"{model.config.model_type} predicts each token from the ones before it"
        raise UnsupportedError(f"{kind}: masking: {said}; leave it out")
    if tokenizer_of(model).mask_token_id is None:
        raise UnsupportedError(
            f"{kind}: masking: the tokenizer of {model.origin.name} has no mask token; leave it out"
        )


def masked_reading(
    step: Masked, model: Model, seed: int
) -> Callable[[nn.Module, Order, int | None], Reading]:
    """What a training by labels reads: the batches of its order, masked."""

    def reading(_: nn.Module, order: Order, batches: int | None) -> Reading:
        return Reading(masked(step, model, seed, order.batch))

    return reading


def masked(step: Masked, model: Model, seed: int, read: Callable[[int], Batch]) -> Callable[[int], Batch]:
    """Batches as the step reads them."""
    if not step.masking:
        return read
    tokenizer = tokenizer_of(model)
    token = tokenizer.mask_token_id
    assert isinstance(token, int)
    return Masking(step.masking, token, tuple(tokenizer.all_special_ids), seed).over(read)
