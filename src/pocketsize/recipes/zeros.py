"""Whether the zeros of grids are free, and which grids hold those of a pruned model as they are."""

from __future__ import annotations

from pocketsize.errors import UnsupportedError
from pocketsize.exporting.table import EXPORTERS
from pocketsize.models.model import Model
from pocketsize.quantization.scheme import Scheme
from pocketsize.recipes.step import Auto


def float_zeros_of(
    where: str,
    asked: bool | Auto,
    symmetric: bool,
    exports: tuple[str, ...],
    model: Model,
) -> bool:
    """Whether zeros may be any number: where nothing is said, where every export stores them so.

    Never for a pruned model: such a grid has no exact 0.
    """
    without = [name for name in exports if not EXPORTERS[name].float_zeros]
    if asked == "auto":
        return bool(exports) and not symmetric and not without and model.pattern is None
    if asked and without:
        raise UnsupportedError(
            f"{where}: {without[0]} cannot store float zeros; use float_zeros: false, or export gguf alone"
        )
    if asked and model.pattern is not None:
        raise UnsupportedError(
            f"{where}: the model is pruned, and a grid with float zeros has no exact 0; "
            "use float_zeros: false"
        )
    return asked


def require_zero_of(where: str, scheme: Scheme, model: Model) -> None:
    """Refuse a scheme with a name that would not keep the zeros of a pruned model."""
    if model.pattern is None:
        return
    if scheme.float_zeros or scheme.super_blocks or scheme.codebook is not None or scheme.floats:
        raise UnsupportedError(
            f"{where}: the model is pruned, and the zeros of {model.pattern.name} pruning are not kept on "
            f"such a grid ({scheme.codebook or 'no exact 0'}); use W8A16, W4A16 or another plain width"
        )
