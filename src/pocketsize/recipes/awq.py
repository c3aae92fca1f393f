"""Recipe step `awq`: inputs are scaled by how much they matter, then everything is rounded to nearest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from pocketsize.errors import UsageError
from pocketsize.models.device import CPU
from pocketsize.models.model import Model
from pocketsize.models.walk import Site
from pocketsize.quantization.awq import EXPONENTS, input_scales
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.rtn import rtn
from pocketsize.recipes.feeds import feed_of, few_windows, fold, require_feeds
from pocketsize.recipes.grids import Quantizer, chosen
from pocketsize.recipes.layers import layer_report
from pocketsize.recipes.quantize import parts, walked
from pocketsize.recipes.record import LayerReport
from pocketsize.recipes.sites import stacked, unstacked, what_is_read
from pocketsize.recipes.step import Context, Unit


@dataclass(frozen=True, slots=True)
class Awq(Quantizer):
    """Recipe step `awq`: activation-aware scales, a grid searched by output error, round to nearest.

    The keys of `rtn`, and `exponents`: how many exponents of the activations' size are tried.
    """

    exponents: int = EXPONENTS

    kind: ClassVar[str] = "awq"
    calibrated: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Quantizer.__post_init__(self)
        if self.exponents < 1:
            raise UsageError(f"awq: exponents must be at least 1, got {self.exponents}")

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Awq:
        """The step with group, symmetry and embedding width decided."""
        require_feeds(self.kind, model)
        return replace(self, **chosen(self, model, exports))

    def apply(self, model: Model, ctx: Context) -> Model:
        """The model with all linears (and the embedding) quantized, and norms that took scales."""
        ctx.findings += few_windows(len(ctx.input_ids))

        def quantize(site: Site, unit: Unit) -> Iterator[tuple[str, QWeight, LayerReport]]:
            return _scaled_site(site, unit, model, self)

        return walked(self, model, ctx, quantize, hold_out=True)


def _scaled_site(
    site: Site, unit: Unit, model: Model, step: Awq
) -> Iterator[tuple[str, QWeight, LayerReport]]:
    """The linears of a site with their inputs scaled, unless that loses more; what feeds them is told."""
    H, pieces = what_is_read(site), list(parts(site, step))
    s, feed, held = torch.ones(len(H), device=H.device), feed_of(site, unit, model), site.held
    # A linear that is left as it is would need the scales too.
    whole = sum(len(part.names) for _, part in pieces) == len(site.names)
    if feed is not None and whole and held is not None and 0 < held.tokens < site.gram.tokens:
        judged, inputs = (site.gram.without(held).mean(), held.mean()), feed.inputs.to(H.device)
        where = {"feeds": inputs, "most": feed.most.to(H.device)}
        of = input_scales(stacked(site), *judged, pieces[0][0], **where, exponents=step.exponents)
        if of is not None:
            s = of[inputs]
            fold(feed, of.to(CPU), unit, model)
    shrunk = H / s / s[:, None]
    for scheme, part in pieces:
        grown = stacked(part) * s
        weight = rtn(grown, scheme, weight=shrunk.diagonal())
        rows = grown.split([w.shape[0] for w in part.weights])
        for name, own, q in zip(part.names, rows, unstacked(weight, part), strict=True):
            site.replaced[name] = q.dequantize() / s
            report = replace(layer_report(name, own, q, shrunk), tokens=site.gram.tokens)
            yield name, q.to(CPU), report
