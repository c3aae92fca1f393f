"""Recipe step `smoothquant`: outliers of inputs are moved into weights, then everything is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from pocketsize.errors import UsageError
from pocketsize.linalg import Gram
from pocketsize.models.device import CPU
from pocketsize.models.model import Model
from pocketsize.models.walk import Site
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.scheme import named
from pocketsize.quantization.smooth import EXPONENTS, smooth_scales
from pocketsize.recipes.feeds import feed_of, few_windows, fold, require_feeds
from pocketsize.recipes.grids import Quantizer, chosen
from pocketsize.recipes.quantize import Gptq, parts, quantize_site, walked
from pocketsize.recipes.record import LayerReport
from pocketsize.recipes.sites import stacked
from pocketsize.recipes.step import Context, Unit

# Tokens on which scales are tried, and as many that judge them.
SAMPLED = 512


@dataclass(frozen=True, slots=True)
class SmoothQuant(Quantizer):
    """Recipe step `smoothquant`: smoothed inputs, both weights and inputs rounded to 8 bits (W8A8, FP8).

    The keys of `rtn`, and `exponents`: how many shares of the inputs' outliers are tried in weights.
    Weights are then quantized as `gptq` does.
    """

    scheme: str = "W8A8"
    exponents: int = EXPONENTS

    kind: ClassVar[str] = "smoothquant"
    calibrated: ClassVar[bool] = True
    moves: ClassVar[bool] = True
    rounds: ClassVar[bool] = True
    sampled: ClassVar[int] = SAMPLED

    def __post_init__(self) -> None:
        Quantizer.__post_init__(self)
        if self.exponents < 1:
            raise UsageError(f"smoothquant: exponents must be at least 1, got {self.exponents}")
        if (own := named(self.scheme)) is None or not own.activations:
            raise UsageError(
                f"smoothquant: {self.scheme} rounds no inputs, so nothing is to be smoothed; use step awq, "
                "or scheme: W8A8"
            )

    def resolve(self, model: Model, exports: tuple[str, ...]) -> SmoothQuant:
        """The step with every choice made; refuses a family in which nothing can be smoothed."""
        require_feeds(self.kind, model)
        return replace(self, **chosen(self, model, exports))

    def apply(self, model: Model, ctx: Context) -> Model:
        """The model with all linears quantized, and norms that took scales."""
        ctx.findings += few_windows(len(ctx.input_ids))

        def quantize(site: Site, unit: Unit) -> Iterator[tuple[str, QWeight, LayerReport]]:
            return _smoothed_site(site, unit, model, self)

        return walked(self, model, ctx, quantize, hold_out=True)


def _smoothed_site(
    site: Site, unit: Unit, model: Model, step: SmoothQuant
) -> Iterator[tuple[str, QWeight, LayerReport]]:
    """The linears of a site with their inputs smoothed where that loses less; what feeds them is told."""
    pieces, feed, sample = list(parts(site, step)), feed_of(site, unit, model), site.sample
    s = torch.ones(site.weights[0].shape[1], device=site.gram.total.device)
    rounding = next((scheme for scheme, _ in pieces if scheme.activations), None)
    # A linear that is left as it is would need the scales too.
    whole = sum(len(part.names) for _, part in pieces) == len(site.names)
    if feed is not None and whole and rounding is not None and sample is not None:
        inputs = feed.inputs.to(s.device)
        where = {"feeds": inputs, "most": feed.most.to(s.device)}
        rows = sample.rows, sample.held, sample.peak
        of = smooth_scales(stacked(site), *rows, rounding, **where, exponents=step.exponents)
        if of is not None:
            s = site.divisor = of[inputs]
            fold(feed, of.to(CPU), unit, model)
    for scheme, part in pieces:
        smoothed = replace(part, weights=tuple(W * s for W in part.weights), gram=_divided(part.gram, s))
        smoothed.first = part.first and _divided(part.first, s)
        for name, weight, report in quantize_site(smoothed, scheme, _GPTQ, pruned=model.pattern is not None):
            site.replaced[name] /= s
            yield name, weight, report


_GPTQ = Gptq()


def _divided(gram: Gram, s: torch.Tensor) -> Gram:
    """The sum for inputs that are divided by s."""
    return Gram(gram.total / s / s[:, None], gram.tokens)
