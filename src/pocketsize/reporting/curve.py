"""The curve of predicted KL over bytes, as inline SVG."""

from __future__ import annotations

import math

from pocketsize.recipes.record import Mixture, SizedLoss
from pocketsize.reporting.chart import bounds, polyline, text, ticks
from pocketsize.reporting.figure import number, size

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 626, 30, 258


def curve(mixture: Mixture) -> str:
    """Least KL within each size as a line, ways with all linears alike as rings, the choice as a dot.

    Both axes are logarithmic. Every way can be focused and says its figures.
    """
    drawn = [p for p in (*mixture.curve, *mixture.alike, mixture.chosen) if p.kl > 0]
    if len(drawn) < 2:
        return ""
    low, high = bounds(min(p.kl for p in drawn), max(p.kl for p in drawn))
    least, most = min(p.bytes for p in drawn), max(p.bytes for p in drawn)

    def at(point: SizedLoss) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * math.log(point.bytes / least) / max(math.log(most / least), 1e-9)
        return x, BOTTOM - (BOTTOM - TOP) * math.log(max(point.kl, low) / low) / math.log(high / low)

    line = polyline([at(point) for point in mixture.curve if point.kl > 0])
    # What is chosen comes last: it lies on top.
    points = [_point(at(p), p, "rtn") for p in mixture.alike if p.name != mixture.chosen.name and p.kl > 0]
    points.append(_point(at(mixture.chosen), mixture.chosen, "own"))
    return (
        f'<svg class="panel curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="Predicted KL over '
        f'bytes, {len(points)} ways">{_axes(low, high, least, most)}<path class="own" d="{line}"/>'
        f"{''.join(points)}</svg>"
    )


def _axes(low: float, high: float, least: int, most: int) -> str:
    marks = []
    for tick in ticks(low, high):
        y = BOTTOM - (BOTTOM - TOP) * math.log(tick / low) / math.log(high / low)
        marks.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    marks.append(f'<text x="{LEFT}" y="{HEIGHT - 22}" text-anchor="start">{size(least)}</text>')
    marks.append(f'<text x="{RIGHT}" y="{HEIGHT - 22}" text-anchor="end">{size(most)}</text>')
    middle = (LEFT + RIGHT) / 2
    marks.append(f'<text x="{middle:.0f}" y="{HEIGHT - 22}" text-anchor="middle">size of the file</text>')
    return f'<g class="axes" aria-hidden="true">{"".join(marks)}</g>'


def _point(at: tuple[float, float], way: SizedLoss, kind: str) -> str:
    words = f"{way.name}: {size(way.bytes)}, KL {number(way.kl)}"
    x, y = at
    return (
        f'<g class="pt" tabindex="0" role="img" aria-label="{text(words)}"><title>{text(words)}</title>'
        f'<rect x="{x - 8:.1f}" y="{y - 8:.1f}" width="16" height="16"/>'
        f'<circle class="{kind} shown" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        f'<text class="tip" x="{RIGHT}" y="16" text-anchor="end" aria-hidden="true">{text(words)}</text></g>'
    )
