"""The losses of a training over its steps, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pocketsize.recipes.record import TrainingReport
from pocketsize.reporting.chart import bounds, polyline, text, ticks
from pocketsize.reporting.figure import number

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 626, 16, 222


def course(report: TrainingReport) -> str:
    """The loss of the text that taught as a line, of held-out text as dots; the loss axis is logarithmic.

    Empty where fewer than two steps have a loss above 0.
    """
    taught = [(step, loss) for step, loss in report.losses if loss > 0]
    looks = [(step, loss) for step, loss in report.looks if loss > 0]
    if len(taught) < 2:
        return ""
    low, high = bounds(min(loss for _, loss in taught + looks), max(loss for _, loss in taught + looks))
    first, last = taught[0][0], max(step for step, _ in taught + looks)

    def at(point: Sequence[float]) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * (point[0] - first) / max(last - first, 1)
        return x, BOTTOM - (BOTTOM - TOP) * math.log(point[1] / low) / math.log(high / low)

    dots = "".join(f'<circle class="own shown" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in map(at, looks))
    said = (
        f"Loss from {number(taught[0][1])} at step {first:.0f} to {number(taught[-1][1])} at step {last:.0f}"
    )
    return (
        f'<svg class="panel curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(said)}">'
        f'{_axes(low, high, (first, last))}<path class="own" d="{polyline([at(p) for p in taught])}"/>'
        f"{dots}</svg>"
    )


def _axes(low: float, high: float, steps: tuple[float, float]) -> str:
    marks = []
    for tick in ticks(low, high):
        y = BOTTOM - (BOTTOM - TOP) * math.log(tick / low) / math.log(high / low)
        marks.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    y, middle = HEIGHT - 14, (LEFT + RIGHT) / 2
    marks.append(f'<text x="{LEFT}" y="{y}" text-anchor="start">{steps[0]:.0f}</text>')
    marks.append(f'<text x="{RIGHT}" y="{y}" text-anchor="end">{steps[1]:,.0f}</text>')
    marks.append(f'<text x="{middle:.0f}" y="{y}" text-anchor="middle">step</text>')
    return f'<g class="axes" aria-hidden="true">{"".join(marks)}</g>'
