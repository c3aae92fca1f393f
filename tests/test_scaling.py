"""The benchmark of scaling: what is fitted, what a run is allowed, and what is drawn."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "scaling" / "record.json"


@pytest.fixture(scope="module")
def run() -> Iterator[ModuleType]:
    """The script, imported as it finds its neighbours when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECORD.parent))
        yield importlib.import_module("run")


def test_the_power_of_what_grows_by_a_power_is_that(run: ModuleType) -> None:
    rows = [{"block_weights": w, "cpu_s": 3 * w**1.25} for w in (10, 40, 70)]
    assert run.power(rows) == pytest.approx(1.25)


def test_what_is_allowed_does_not_grow_with_the_blocks(run: ModuleType) -> None:
    for step in run.STEPS:
        allowed = {run.room(size, step, 4) for way, size in run.grown(step) if way == run.DEEPER}
        assert len(allowed) == 1 and allowed.pop() > run.SIZES[0].block_bytes


def test_a_run_that_left_something_out_is_no_row(run: ModuleType) -> None:
    step, cost = run.LEARNED, {"matrices": 28, "stages": [], "rss_before": 1, "number_bytes": 4}
    size = next(size for _, size in run.grown(step))
    with pytest.raises(SystemExit, match="not all was quantized"):
        run.row(step, run.WIDER, size, cost)


def test_what_is_drawn_is_what_is_recorded(run: ModuleType) -> None:
    record = json.loads(RECORD.read_text())
    drawn = importlib.import_module("plot").drawn(record)
    assert RECORD.with_name("plot.svg").read_text() == drawn, "run python benchmarks/scaling/plot.py"
    assert "\n" not in drawn.strip()  # a line of Markdown
    points = re.findall(r'<path d="M[^"]*" transform="translate', drawn)
    names = {row["method"] for row in record["rows"]}
    assert len(points) == 2 * len(record["rows"]) + len(names)
    for text in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text"):
        assert text.text
