"""Charts say what they show, to scale, and are well-formed whatever they are given."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from pocketsize.recipes.record import LayerReport, SizedLoss
from pocketsize.reporting import chart
from pocketsize.reporting.curve import curve
from pocketsize.reporting.layers import layout
from reporting.records import layers, mixture


def panels(reports: tuple[LayerReport, ...], method: str = "GPTQ") -> list[ET.Element]:
    placed = layout(reports)
    return [
        ET.fromstring(
            chart.error_panel(
                p, low=placed.low, high=placed.high, last_block=placed.last_block, names=(method, "RTN")
            )
        )
        for p in placed.panels
    ]


def test_every_column_can_be_focused_and_is_titled() -> None:
    for svg in panels(layers(30)):
        points = [g for g in svg if g.get("class") == "pt"]
        assert len(points) == 30
        assert all(g.get("tabindex") == "0" and g.find("title") is not None for g in points)
        assert re.fullmatch(
            r"block 0: GPTQ [\d.]+\u00a0%, RTN [\d.]+\u00a0%", points[0].findtext("title") or ""
        )


def test_points_stay_inside_the_axes_and_smaller_errors_stand_lower() -> None:
    for svg in panels(layers(30)):
        for point in (g for g in svg if g.get("class") == "pt"):
            own, rtn = (
                float(next(c for c in point.iter("circle") if c.get("class") == k).get("cy", ""))
                for k in ("own", "rtn")
            )
            assert chart.TOP <= rtn < own <= chart.BOTTOM


def test_round_to_nearest_alone_is_one_line() -> None:
    same = tuple(replace(layer, error=layer.rtn_error) for layer in layers(4))
    for svg in panels(same, "RTN"):
        assert [p.get("class") for p in svg.iter("path") if p.get("class") in ("own", "rtn")] == ["own"]


@pytest.mark.parametrize("error", [0.0, 1e-300, 1e-12, 1.0, 1e12])
def test_extreme_errors_are_drawn(error: float) -> None:
    assert panels((LayerReport("h.0.a.weight", 1, 1, 4, 4.0, error, 0.01),))
    assert panels((LayerReport("h.0.a.weight", 1, 1, 4, 4.0, error, error),))


def test_names_are_escaped() -> None:
    evil = "h.0.<script>\"'&\x00.weight"
    (svg,) = panels((LayerReport(evil, 1, 1, 4, 4.0, 0.1, 0.2),), method="<b>")
    assert "<script>" in (svg.get("aria-label") or "") and not list(svg.iter("script"))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0009, 0.034, (0.0005, 0.05)),
        (0.01, 0.1, (0.01, 0.1)),
        (0.5, 0.5, (0.5, 1.0)),
        (3e-9, 2.0, (2e-9, 2.0)),
    ],
)
def test_bounds_are_round_and_enclose(low: float, high: float, expected: tuple[float, float]) -> None:
    assert chart.bounds(low, high) == pytest.approx(expected)


def test_there_are_never_too_many_ticks() -> None:
    for high in (0.02, 0.2, 5.0, 1e6):
        marks = chart.ticks(*chart.bounds(0.01, high))
        assert 2 <= len(marks) <= 7 and marks == sorted(marks)


def test_a_bar_is_to_scale() -> None:
    svg = ET.fromstring(chart.bar([("c0", 600), ("c1", 200)], full=1000, label="a & b"))
    assert [float(r.get("width", "")) for r in svg] == pytest.approx([598, 198])
    assert float(svg[1].get("x", "")) == 600
    assert not list(ET.fromstring(chart.bar([], full=0, label="")))


def test_pockets_have_areas_to_scale() -> None:
    svg = ET.fromstring(chart.pocket([("bf16", 400), ("download", 0), ("ships", 100)]))
    widths = {}
    for path in svg:
        left, right = re.match(r"M([\d.]+) [\d.]+H([\d.]+)", path.get("d", "")).groups()  # type: ignore[union-attr]
        widths[path.get("class")] = float(right) - float(left)
    assert widths["bf16"] == pytest.approx(2 * widths["ships"], rel=1e-3)
    assert "download" not in widths
    assert chart.pocket([("bf16", 0)]) == ""


def test_the_curve_of_widths_falls_and_the_choice_lies_on_top() -> None:
    chosen, svg = mixture(), curve(mixture())
    line = re.search(r'<path class="own" d="M([^"]+)"', svg)
    assert line is not None
    points = [tuple(map(float, point.split())) for point in line[1].split("L")]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points)
    assert svg.rindex("4-bit blocks, 43 linears of other widths") > svg.rindex(
        "4-bit blocks, 8-bit embeddings"
    )
    assert curve(replace(chosen, curve=(), alike=())) == ""


def test_a_way_that_costs_nothing_has_no_place_on_a_logarithmic_axis() -> None:
    free = replace(mixture(), alike=(SizedLoss("its own grid", 98_000_000, 0.0),))
    assert "its own grid" not in curve(free)
