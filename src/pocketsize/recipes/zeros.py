"""Which grids hold the zeros of a pruned model as they are."""

from __future__ import annotations

from typing import Literal

from pocketsize.errors import UnsupportedError
from pocketsize.models.model import Model
from pocketsize.quantization.scheme import Scheme


def require_zero(where: str, float_zeros: bool | Literal["auto"]) -> bool:
    """False, for grids of a pruned model: one whose zeros are any number has no exact 0."""
    if float_zeros is True:
        raise UnsupportedError(
            f"{where}: the model is pruned, and a grid with float zeros has no exact 0; "
            "use float_zeros: false"
        )
    return False


def require_zero_of(where: str, scheme: Scheme, model: Model) -> None:
    """Refuse a scheme with a name that would not keep the zeros of a pruned model."""
    if model.pattern is None:
        return
    if scheme.float_zeros or scheme.super_blocks or scheme.codebook is not None or scheme.floats:
        raise UnsupportedError(
            f"{where}: the model is pruned, and the zeros of {model.pattern.name} pruning are not kept on "
            f"such a grid ({scheme.codebook or 'no exact 0'}); use W8A16, W4A16 or another plain width"
        )
