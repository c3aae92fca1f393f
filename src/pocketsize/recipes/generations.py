"""Born-again students: the student of one generation is the teacher of the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from pocketsize.data.calibration import Windows
from pocketsize.measurement.tokens import compare
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.model import Model
from pocketsize.recipes.record import Finding, Stage, StepReport
from pocketsize.recipes.stages import part_of
from pocketsize.recipes.step import Context
from pocketsize.training.examples import Examples

# Texts that do not teach: they judge which generation is kept.
JUDGES = 16

# A student of the model, taught by another one; None for the teacher that the step names.
Raise = Callable[[Context, Model | None], Model]


def generations(count: int, ctx: Context, judge: Examples, taught: Raise) -> Model:
    """The best of so many generations, as far as each is better than the one before.

    Each begins where the first began and is taught by the one before (arXiv:1805.04770); what judges is the
    loss of the true tokens of held-out text. Each keeps its work in a store of its own.
    """
    best: Model | None = None
    stages: list[Stage] = []
    reports: list[StepReport] = []
    for number in range(count):
        own = part_of(ctx, f"generation-{number + 1}", number, count)
        student = taught(own, best)
        loss = _loss(student, judge)
        better = not stages or loss < stages[-1].divergence
        stages.append(Stage(f"generation {number + 1}", loss, kept=better))
        if not better:
            said = f"generation {number + 1} is no better than its teacher on held-out text, and was dropped"
            ctx.findings.append(Finding("generation-dropped", said))
            break
        best, reports = student, own.reports
        ctx.findings += own.findings
    assert best is not None
    ctx.reports.append(replace(reports[-1], stages=tuple(stages)))
    return best


def _loss(model: Model, judge: Examples) -> float:
    """-log p of the true tokens of these texts, mean, nats."""
    batch = judge.batch(range(len(judge)))
    windows = Windows(batch.ids, batch.mask, torch.zeros(len(judge)), "texts that judge", "", 0)
    return float(compare(model, model, windows, forward_dtype()).nll[0].mean())
