"""Recipe step `awq`: inputs are scaled by how much they matter, then everything is rounded to nearest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.models.device import CPU
from pocketsize.models.model import Model
from pocketsize.models.walk import HELD_OUT, Site
from pocketsize.quantization.awq import EXPONENTS, input_scales
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.rtn import rtn
from pocketsize.recipes.grids import Quantizer, chosen
from pocketsize.recipes.layers import layer_report
from pocketsize.recipes.quantize import parts, stacked, unstacked, walked, what_is_read
from pocketsize.recipes.record import Finding, LayerReport
from pocketsize.recipes.step import Context, Unit


@dataclass(frozen=True, slots=True)
class Awq(Quantizer):
    """Recipe step `awq`: activation-aware scales, a grid searched by output error, round to nearest.

    The keys of `rtn`, and `exponents`: how many exponents of the activations' size are tried.
    """

    exponents: int = EXPONENTS

    kind: ClassVar[str] = "awq"
    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Quantizer.__post_init__(self)
        if self.exponents < 1:
            raise UsageError(f"awq: exponents must be at least 1, got {self.exponents}")

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Awq:
        """The step with group, symmetry and embedding width decided."""
        if all(group.fed_by is None for group in model.arch.groups):
            raise UnsupportedError(
                f"{model.folder}: awq: in the family {model.config.model_type} nothing before a linear can "
                "take its scales; use step gptq"
            )
        return replace(self, **chosen(self, model, exports))

    def apply(self, model: Model, ctx: Context) -> Model:
        """The model with all linears (and the embedding) quantized, and norms that took scales."""
        if len(ctx.input_ids) < HELD_OUT:
            said = f"every {HELD_OUT}th calibration window judges scales; of {len(ctx.input_ids)} none does"
            ctx.findings.append(Finding("few-windows", f"{said}: nothing was scaled", ""))

        def quantize(site: Site, unit: Unit) -> Iterator[tuple[str, QWeight, LayerReport]]:
            return _scaled_site(site, unit, model, self)

        return walked(self, model, ctx, quantize, hold_out=True)


@dataclass(frozen=True, slots=True)
class _Feed:
    """What feeds a site: a norm or a linear; which of its outputs each input is; what they can take."""

    path: str
    inputs: Int64[Tensor, "in"]
    most: Float[Tensor, "fed"]


def _scaled_site(
    site: Site, unit: Unit, model: Model, step: Awq
) -> Iterator[tuple[str, QWeight, LayerReport]]:
    """The linears of a site with their inputs scaled, unless that loses more; what feeds them is told."""
    H, pieces = what_is_read(site), list(parts(site, step))
    s, feed, held = torch.ones(len(H), device=H.device), _feed(site, unit, model), site.held
    # A linear that is left as it is would need the scales too.
    whole = sum(len(part.names) for _, part in pieces) == len(site.names)
    if feed is not None and whole and held is not None and 0 < held.tokens < site.gram.tokens:
        judged, inputs = (site.gram.without(held).mean(), held.mean()), feed.inputs.to(H.device)
        where = {"feeds": inputs, "most": feed.most.to(H.device)}
        of = input_scales(stacked(site), *judged, pieces[0][0], **where, exponents=step.exponents)
        if of is not None:
            s = of[inputs]
            _fold(feed, of.to(CPU), unit, model)
    shrunk = H / s / s[:, None]
    for scheme, part in pieces:
        grown = stacked(part) * s
        weight = rtn(grown, scheme, weight=shrunk.diagonal())
        rows = grown.split([w.shape[0] for w in part.weights])
        for name, own, q in zip(part.names, rows, unstacked(weight, part), strict=True):
            site.replaced[name] = q.dequantize() / s
            report = replace(layer_report(own, q, shrunk), name=name, tokens=site.gram.tokens)
            yield name, q.to(CPU), report


def _feed(site: Site, unit: Unit, model: Model) -> _Feed | None:
    """What can take the scales of a site; None where nothing can."""
    if site.fed_by is None:
        return None
    columns, own = site.weights[0].shape[1], unit.weights.get(f"{site.fed_by}.weight")
    each = torch.arange(columns)
    if own is None:
        if f"{site.fed_by}.weight" in model.linears_of(site.block):
            return None  # a linear that an override leaves as it is
        return _Feed(site.fed_by, each, torch.full((columns,), float("inf")))
    rows = len(own.codes)
    if columns != rows:  # several query heads read one head of values
        width = model.head_width
        if columns % rows or rows % width:
            return None
        each = each // width // (columns // rows) * width + each % width
    return _Feed(site.fed_by, each, own.most)


def _fold(feed: _Feed, s: Float[Tensor, "fed"], unit: Unit, model: Model) -> None:
    """Divide what feeds a site by its scales: a quantized linear by rows, a norm, and their biases."""
    name, bias = f"{feed.path}.weight", f"{feed.path}.bias"
    if name in unit.weights:
        unit.weights[name] = unit.weights[name].divided(s)
    else:
        unit.changed[name] = model.original(name) / s
    if bias in model.checkpoint.entries:
        unit.changed[bias] = model.original(bias) / s
