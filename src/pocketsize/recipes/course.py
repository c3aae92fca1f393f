"""What a training tells of itself when it is over."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pocketsize.models.model import Model
from pocketsize.recipes.record import Finding, TrainingReport, Zeros
from pocketsize.training.examples import Examples
from pocketsize.training.loop import Course

# Readings of a text after which it is said.
MANY = 4
# A loss that is higher by no more than this is as it was.
WORSE, LEAST = 1.02, 1e-3


def course_report(
    course: Course, teachers: Sequence[str], examples: Examples, module: nn.Module
) -> TrainingReport:
    """How a training went, who taught, and how large the student is."""
    return TrainingReport(
        teachers=tuple(teachers),
        parameters=sum(p.numel() for p in module.parameters()),
        steps=course.step,
        tokens=course.tokens,
        epochs=course.tokens / examples.tokens,
        skipped=course.skipped,
        losses=tuple((float(step), loss) for step, loss in course.losses),
        looks=tuple((float(step), loss) for step, loss in course.looks),
        pruned=tuple((float(step), share) for step, share in course.pruned),
        judged=() if course.judged is None else course.judged,
    )


def findings_of(report: TrainingReport) -> list[Finding]:
    """What a user should know of a training."""
    found: list[Finding] = []
    if report.skipped:
        said = (
            f"{report.skipped} of {report.steps} training steps were left out: their gradient was not finite"
        )
        found.append(Finding("steps-skipped", f"{said}; the learning rate was halved each time"))
    if report.judged and not report.judged[1] <= WORSE * report.judged[0] + LEAST:
        found.append(Finding("training-worse", _worse(report)))
    if report.epochs > MANY:
        found.append(
            Finding(
                "repeated-training-text",
                f"the training text was read {report.epochs:.1f} times; give more text",
            )
        )
    return found


def _worse(report: TrainingReport) -> str:
    """What is said of a training that was worse than none."""
    before, after = report.judged
    text = "held-out text" if report.looks else "text that it read"
    what = "the student is further from its teacher" if report.teachers else "the model predicts it worse"
    return (
        f"the loss of {text} is {after:.4g} after the training, {before:.4g} before: {what}; lower the rate"
    )


def zeros_in(module: nn.Module, model: Model) -> tuple[Zeros, ...]:
    """How many weights of each linear are zero."""
    linears = {name: module.get_parameter(name).detach() for name in model.linears}
    return tuple(Zeros(name, int((W == 0).sum()), W.numel()) for name, W in linears.items())
