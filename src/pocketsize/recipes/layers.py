"""What is told of each quantized matrix, and what of all of them together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pocketsize.errors import NumericalError
from pocketsize.models.model import Model
from pocketsize.quantization.gptq import GptqResult
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.rtn import rtn
from pocketsize.recipes.fallbacks import raised_damping
from pocketsize.recipes.grids import Quantizer
from pocketsize.recipes.mixes import stand_ins
from pocketsize.recipes.record import Finding, LayerReport, StepReport
from pocketsize.recipes.rival import denser, whole_of
from pocketsize.recipes.step import Context

REPORT_ROWS = 32


def layer_report(
    name: str, W: Tensor, q: QWeight, H: Tensor | None, done: GptqResult | None = None
) -> LayerReport:
    """Relative error on at most 32 evenly spaced rows, against plain rounding on the same grid.

    A grid whose scales, or values of code 0, nothing holds is refused.
    """
    if lost := int((~(q.scale.isfinite() & q.minimum.isfinite())).sum()):
        way = "use float_zeros: false, or " if q.scheme.float_zeros else ""
        raise NumericalError(
            f"{name}: {lost} of its {q.scale.numel()} groups have a scale, or a value of code 0, beyond what "
            f"float16 holds (65504); {way}leave the matrix out with an override"
        )
    rows, columns = W.shape
    pick = torch.linspace(0, rows - 1, min(rows, REPORT_ROWS)).round().long().to(W.device)
    sample, mine = W[pick], QWeight(q.codes[pick], q.scale[pick], q.zero[pick], q.scheme).dequantize()

    plain = rtn(sample, q.scheme).dequantize()
    stacked = torch.cat((sample, sample - mine, sample - plain))
    energies = ((stacked if H is None else stacked @ H) * stacked).view(3, -1).sum(1, dtype=torch.float64)
    whole = max(float(energies[0]), 1e-30)
    return LayerReport(
        name=name,
        rows=rows,
        columns=columns,
        bits=q.scheme.bits,
        bits_per_weight=round(q.scheme.bits_per_weight(columns), 4),
        error=float(energies[1]) / whole,
        rtn_error=float(energies[2]) / whole,
        damp=done.damp if done else 0.0,
        escalations=done.escalations if done else 0,
        dead=0 if H is None else int((H.diagonal() == 0).sum()),
    )


def finish(step: Quantizer, model: Model, ctx: Context, reports: list[LayerReport], *, tokens: int) -> Model:
    """Hand over the reports and whatever the user should know about them."""
    options = {name: getattr(step, name) for name in step.__dataclass_fields__}
    ctx.reports.append(StepReport(step.kind, options, tuple(reports), tokens))
    ctx.findings += [*stand_ins(step.overrides, model), *_told_together(reports)]
    if model.pattern is not None:
        ctx.findings += denser(reports, "codes", known=whole_of(model, ctx) is not None)
    if step.calibrated:
        ctx.findings += _starved([r for r in reports if model.arch.is_expert(r.name)])
    if tokens and (widest := max(reports, key=lambda r: r.columns)).columns > tokens:
        ctx.findings.append(
            Finding(
                "few-tokens",
                f"{tokens} calibration tokens show at most {tokens} of {widest.columns} directions of its "
                "inputs; the rest is left to the damping: give more text",
                widest.name,
            )
        )
    return model.with_quantized(ctx.store.weights(), ctx.store.changed())


def _told_together(reports: list[LayerReport]) -> Iterator[Finding]:
    """Whose damping was raised, and whose inputs were dead: one finding each, which names the worst."""
    yield from raised_damping(reports)
    dead = [r for r in reports if r.dead]
    if dead:
        worst = max(dead, key=lambda r: r.dead / r.columns)
        said = f"{len(dead)} of {len(reports)} matrices have inputs that were always zero, at most"
        yield Finding("dead-inputs", f"{said} {worst.dead} of {worst.columns}", worst.name)


def _starved(experts: list[LayerReport]) -> Iterator[Finding]:
    """Which matrices of experts were calibrated on no token, or on fewer than they have inputs."""
    none = [r.name for r in experts if not r.tokens]
    few = [r.name for r in experts if 0 < r.tokens < r.columns]
    if none:
        said = "saw no calibration token and were rounded without; give more calibration text"
        yield Finding("experts-without-tokens", f"{len(none)} of {len(experts)} matrices {said}", none[0])
    if few:
        said = "saw fewer calibration tokens than they have inputs"
        yield Finding("experts-with-few-tokens", f"{len(few)} of {len(experts)} matrices {said}", few[0])
