"""Charts as inline SVG: pure functions from numbers to markup, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from pocketsize.reporting.figure import clean, percent, size
from pocketsize.reporting.layers import Column, Panel

# A panel's drawing, in its own units; the page scales it to the width there is.
WIDTH, HEIGHT = 264, 172
LEFT, RIGHT, TOP, BOTTOM = 46, 258, 26, 148


def pocket(bytes_by_role: Sequence[tuple[str, int]]) -> str:
    """Nested pockets whose areas are to scale: (class name, bytes) from any order, largest drawn first."""
    shown = sorted((item for item in bytes_by_role if item[1] > 0), key=lambda item: -item[1])
    if not shown:
        return ""
    largest = shown[0][1]
    drawn = "".join(_pocket_shape(role, math.sqrt(count / largest)) for role, count in shown)
    words = "; ".join(f"{role}: {size(count)}" for role, count in shown)
    return (
        f'<svg class="pocket" viewBox="-2 -2 244 264" role="img" aria-label="Areas to scale. {text(words)}">'
        f"{drawn}</svg>"
    )


def _pocket_shape(role: str, scale: float) -> str:
    """One patch pocket hanging from the middle of the top edge, `scale` times as wide as the largest."""
    stitched = role == "ships"
    shape = f'<path class="{text(role)}" d="{_pocket_path(240 * scale, 0)}"/>'
    inset = 7 * min(1.0, scale / 0.4)
    return shape + (f'<path class="stitch" d="{_pocket_path(240 * scale, inset)}"/>' if stitched else "")


def _pocket_path(width: float, inset: float) -> str:
    """A straight hem, straight sides, a bottom that comes to a blunt point; 13/12 as tall as wide."""
    left, right = 120 - width / 2 + inset, 120 + width / 2 - inset
    height = width * 13 / 12
    shoulder, tip = 0.76 * height - 0.4 * inset, height - 1.2 * inset
    return f"M{left:.1f} {inset:.1f}H{right:.1f}V{shoulder:.1f}L120 {tip:.1f}L{left:.1f} {shoulder:.1f}Z"


def bar(parts: Sequence[tuple[str, int]], *, full: int, label: str) -> str:
    """One stacked bar: (class name, bytes) from left to right, `full` bytes being the whole width."""
    x, pieces = 0.0, []
    for role, count in parts:
        width = 1000 * max(count, 0) / full if full > 0 else 0.0
        # The gap is kept out of slivers, which would vanish in it.
        drawn = width - 2 if width > 4 else width
        pieces.append(f'<rect class="{text(role)}" x="{x:.2f}" width="{drawn:.2f}" height="20"/>')
        x += width
    return (
        f'<svg class="bar" viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(label)}">{"".join(pieces)}</svg>'
    )


def error_panel(panel: Panel, *, low: float, high: float, last_block: int, names: tuple[str, str]) -> str:
    """Errors of one kind of linear over the blocks, on a log axis shared by all panels.

    A solid line with dots is the first of `names`, a dashed one what it is held against. Every column can be
    focused and carries its figures as a title and as a line of text that shows on hover and focus.
    """
    low, high = bounds(low, high)
    span = (RIGHT - LEFT) / (last_block + 1)

    def x(column: Column) -> float:
        return LEFT + span * ((column.first + column.last) / 2 + 0.5)

    def y(error: float) -> float:
        return _height(error, low, high)

    own = [(x(c), y(c.error)) for c in panel.columns]
    rtn = [(x(c), y(c.rtn_error)) for c in panel.columns]
    same = all(c.error == c.rtn_error for c in panel.columns)
    ranges = [f"M{x(c):.1f} {y(c.low):.1f}V{y(c.high):.1f}" for c in panel.columns if c.layers > 1]
    lines = "" if same else f'<path class="rtn" d="{polyline(rtn)}"/>'
    lines += f'<path class="range" d="{"".join(ranges)}"/>' if ranges else ""
    lines += f'<path class="own" d="{polyline(own)}"/>'
    points = "".join(
        _point(c, own[i], None if same else rtn[i], names, span) for i, c in enumerate(panel.columns)
    )
    return (
        f'<svg class="panel" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{text(panel.kind)}, '
        f'{len(panel.columns)} points">{_axes(low, high, last_block)}{lines}{points}</svg>'
    )


def bounds(low: float, high: float) -> tuple[float, float]:
    """The nearest 1, 2 or 5 times a power of ten at or below `low`, and at or above `high`, but not equal."""
    below = max(step for step in _steps(low, high) if step <= low * (1 + 1e-9))
    above = min(step for step in _steps(low, high) if step >= high * (1 - 1e-9) and step > below)
    return below, above


def ticks(low: float, high: float, *, most: int = 7) -> list[float]:
    """Values to label between two bounds: 1, 2, 5 steps, else decades, else every few decades."""
    inside = [step for step in _steps(low, high) if low * (1 - 1e-9) <= step <= high * (1 + 1e-9)]
    if len(inside) <= most:
        return inside
    powers = [step for step in inside if f"{step:e}".startswith("1.0")]
    return powers[:: math.ceil(len(powers) / most)]


def _steps(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    return [float(f"{digit}e{exponent}") for exponent in range(first, last + 1) for digit in (1, 2, 5)]


def _height(value: float, low: float, high: float) -> float:
    """Where a value stands on the log axis; what is below the axis, zero for instance, on its foot."""
    if value <= low:
        return BOTTOM
    return max(TOP, BOTTOM - (BOTTOM - TOP) * math.log(value / low) / math.log(high / low))


def _axes(low: float, high: float, last_block: int) -> str:
    """Lines at the ticks with their shares, and the first and last block."""
    marks = []
    for tick in ticks(low, high):
        y, label = (
            _height(tick, low, high),
            f"{100 * tick:.10f}".rstrip("0").rstrip(".") if tick > 1e-9 else f"{100 * tick:.0e}",
        )
        marks.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        marks.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{label}\u00a0%</text>')
    ends = [(LEFT, "start", "block 0"), (RIGHT, "end", str(last_block))]
    if last_block == 0:
        ends.pop()
    marks += [f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="{a}">{words}</text>' for x, a, words in ends]
    return f'<g class="axes" aria-hidden="true">{"".join(marks)}</g>'


def _point(
    column: Column,
    own: tuple[float, float],
    rtn: tuple[float, float] | None,
    names: tuple[str, str],
    span: float,
) -> str:
    several = column.last > column.first
    where = f"blocks {column.first} to {column.last}" if several else f"block {column.first}"
    short = f"{column.first}–{column.last}" if several else str(column.first)
    method, beside = names
    title = f"{where}: {method} {percent(column.error)}"
    tip = f"{short}: {percent(column.error)}"
    if rtn is not None:
        title += f", {beside} {percent(column.rtn_error)}"
        tip += f" · {beside} {percent(column.rtn_error)}"
    if column.layers > 1:
        title += f"; mean of {column.layers}, {percent(column.low)} to {percent(column.high)}"
    width = max(span * (column.last - column.first + 1), 1.0)
    radius = min(2.6, max(1.2, span * 0.36))
    ring = (
        "" if rtn is None else f'<circle class="rtn" cx="{rtn[0]:.1f}" cy="{rtn[1]:.1f}" r="{radius:.1f}"/>'
    )
    return (
        f'<g class="pt" tabindex="0" role="img" aria-label="{text(title)}"><title>{text(title)}</title>'
        f'<rect x="{own[0] - width / 2:.1f}" y="{TOP - 4}" width="{width:.1f}" height="{BOTTOM - TOP + 8}"/>'
        f'{ring}<circle class="own" cx="{own[0]:.1f}" cy="{own[1]:.1f}" r="{radius:.1f}"/>'
        f'<text class="tip" x="{RIGHT}" y="13" text-anchor="end" aria-hidden="true">{text(tip)}</text></g>'
    )


def polyline(points: Sequence[tuple[float, float]]) -> str:
    """The path through these points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""


def text(words: str) -> str:
    """Words as they may stand in markup, or in an attribute."""
    return escape(clean(words), quote=True)
