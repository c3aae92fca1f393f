"""Draws `plot.svg` from `record.json`: `python benchmarks/scaling/plot.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketsize.reporting.chart import bounds, polyline, text, ticks

# One panel, and the whole: two beside two, below a line that says which colour is what.
WIDTH, HEIGHT, HEAD = 400, 262, 34
LEFT, RIGHT, TOP, BOTTOM = 56, 386, 30, 214
# Colours of the documents' pages where they are known, else these.
PAPER, SOFT, RULE = "var(--paper, #fcfcfd)", "var(--soft, #535d72)", "var(--rule, #dce0e9)"
COLOURS = (
    "var(--denim, #2b4a8b)",
    "var(--thread, #a8541c)",
    "var(--good, #1c6b45)",
    "var(--violet, #76418a)",
)
DASHED = f"fill: none; stroke: {SOFT}; stroke-dasharray: 5 4"
# A mark of its own for each line, around its point.
MARKS = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-3.5-3.5h7v7h-7z", "M0-5L5 0L0 5L-5 0z", "M0-5L4.5 3.5h-9z")
FONT = "font: 12px system-ui, 'Liberation Sans', Arial, sans-serif"

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Panel:
    """What one panel shows of rows that grow in `way`: `y` over `x`.

    Axes are logarithmic, but for a vertical one that is `even`: that begins at 0. `beside` is a dashed line:
    a figure of the rows or, without one, what would be in proportion to the first; and its words.
    """

    title: str
    under: str
    way: str
    x: str
    y: str
    beside: tuple[str | None, str] | None = None
    even: bool = False


DEPTH, WEIGHTS = "blocks of one shape", "weights in blocks"
PROPORTION, WHOLE = (None, "in proportion"), ("model_mb", "the whole model in bfloat16")
PANELS = (
    Panel("CPU seconds", WEIGHTS, "width", "block_weights", "cpu_s", PROPORTION),
    Panel("CPU seconds", DEPTH, "depth", "blocks", "cpu_s", PROPORTION),
    Panel("peak memory, MB", WEIGHTS, "width", "block_weights", "rss_peak_mb", WHOLE),
    Panel("peak memory, MB", DEPTH, "depth", "blocks", "rss_peak_mb", even=True),
)


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: where a value stands, and which values are labelled."""

    low: float
    high: float
    ends: Point
    marked: Sequence[float]
    even: bool = False

    def at(self, value: float) -> float:
        """The place of a value."""
        whole = self.high - self.low if self.even else math.log(self.high / self.low)
        part = value - self.low if self.even else math.log(value / self.low)
        return self.ends[0] + (self.ends[1] - self.ends[0]) * part / whole


def write_plot(record: Path) -> None:
    """Draw a record beside it."""
    record.with_name("plot.svg").write_text(drawn(json.loads(record.read_text())), encoding="utf-8")


def drawn(record: dict[str, Any]) -> str:
    """The whole drawing."""
    rows = record["rows"]
    names = list(dict.fromkeys(row["method"] for row in rows))
    corners = [(WIDTH * (i % 2), HEAD + HEIGHT * (i // 2)) for i in range(len(PANELS))]
    panels = "".join(
        f'<g transform="translate({x} {y})">{_panel(panel, rows, names)}</g>'
        for panel, (x, y) in zip(PANELS, corners, strict=True)
    )
    width, height = 2 * WIDTH, HEAD + 2 * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{text(record["question"])}" style="{FONT}; fill: {SOFT}; background: {PAPER}">'
        f"{_names(names)}{panels}</svg>\n"
    )


def _names(names: Sequence[str]) -> str:
    """The marks and what they stand for, above all panels."""
    at, parts = LEFT + 5, list[str]()
    for i, name in enumerate(names):
        parts.append(f'{_mark(i, (at, 18))}<text x="{at + 10}" y="22">{text(name)}</text>')
        at += 40 + 7 * len(name)
    return "".join(parts)


def _panel(panel: Panel, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    lines = [
        [
            (row[panel.x], row[panel.y])
            for row in rows
            if (row["grows in"], row["method"]) == (panel.way, name)
        ]
        for name in names
    ]
    beside = _beside(
        panel, [row for row in rows if (row["grows in"], row["method"]) == (panel.way, names[0])]
    )
    across = _across(panel, [x for line in lines for x, _ in line])
    up = _up(panel, [y for line in (*lines, beside) for _, y in line])
    parts = [f'<text x="{LEFT}" y="16" font-weight="600">{text(panel.title)}</text>']
    for tick in up.marked:
        y = up.at(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" style="stroke: {RULE}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in across.marked:
        x, words = across.at(tick), _count(tick)
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 17}" text-anchor="middle">{words}</text>')
    middle = (LEFT + RIGHT) // 2
    parts.append(f'<text x="{middle}" y="{BOTTOM + 34}" text-anchor="middle">{text(panel.under)}</text>')
    if panel.beside is not None:
        path = polyline([(across.at(x), up.at(y)) for x, y in beside])
        parts.append(f'<path d="{path}M{RIGHT - 24} 12H{RIGHT}" style="{DASHED}"/>')
        parts.append(f'<text x="{RIGHT - 30}" y="16" text-anchor="end">{text(panel.beside[1])}</text>')
    for i, line in enumerate(lines):
        points = [(across.at(x), up.at(y)) for x, y in line]
        style = f"fill: none; stroke: {COLOURS[i]}; stroke-width: 1.5"
        parts.append(f'<path d="{polyline(points)}" style="{style}"/>')
        parts += [_mark(i, point) for point in points]
    return "".join(parts)


def _across(panel: Panel, xs: Sequence[float]) -> Axis:
    """The horizontal axis: blocks are few enough to be labelled each."""
    if panel.x == "blocks":
        return Axis(min(xs) / 1.15, max(xs) * 1.15, (LEFT, RIGHT), sorted(set(xs)))
    low, high = bounds(min(xs), max(xs))
    return Axis(low, high, (LEFT, RIGHT), ticks(low, high))


def _up(panel: Panel, ys: Sequence[float]) -> Axis:
    """The vertical axis."""
    if panel.even:
        step = next(
            step for step in ticks(1, 10 ** math.ceil(math.log10(max(ys))), most=99) if max(ys) < 6 * step
        )
        count = math.ceil(max(ys) / step)
        return Axis(0, count * step, (BOTTOM, TOP), [i * step for i in range(count + 1)], even=True)
    low, high = bounds(min(ys), max(ys))
    return Axis(low, high, (BOTTOM, TOP), ticks(low, high, most=8))


def _beside(panel: Panel, first: Sequence[dict[str, Any]]) -> list[Point]:
    """The dashed line, by the rows of the first line."""
    if panel.beside is None:
        return []
    if (key := panel.beside[0]) is not None:
        return [(row[panel.x], row[key]) for row in first]
    (x, y), last = (first[0][panel.x], first[0][panel.y]), first[-1][panel.x]
    return [(x, y), (last, y * last / x)]


def _count(number: float) -> str:
    """A number of blocks, or of weights."""
    words = ((1e9, "B"), (1e6, "M"), (1, ""))
    return next(f"{number / size:g}{word}" for size, word in words if number >= size)


def _mark(number: int, at: Point) -> str:
    place = f'transform="translate({at[0]:.1f} {at[1]:.1f})"'
    return f'<path d="{MARKS[number]}" {place} style="fill: {COLOURS[number]}"/>'


if __name__ == "__main__":
    write_plot(Path(__file__).with_name("record.json"))
