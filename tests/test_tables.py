"""Tables made from records: what is known in its order, what is new under its own name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import tables


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    spread = {"median": 0.5, "min": 0.25, "max": 0.75}
    same = {"median": 1234.5, "min": 1234.5, "max": 1234.5}
    rows = [
        {"layers": 12, "kl": spread, "side": "ours", "seeds": [0, 1, 2], "domains": {"fiction": {}}},
        {"layers": 24, "kl": same, "side": "theirs", "seeds": [0], "dtype": "float32"},
    ]
    bar = {"name": "KL", "value": 0.5, "unit": "nats", "better": "lower", "target": 0.4, "met": False}
    facts = {"question": "Why?", "date": "2026-11-24", "machine": {"cpu": "X", "cores": 2}, "threads": 1}
    folder = tmp_path / "benchmarks" / "new"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(
        json.dumps(facts | {"versions": {"a": "1"}, "rows": rows, "bars": [bar]})
    )
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return "new"


def test_rows_have_known_columns_first_and_show_spread(record: str) -> None:
    assert tables.rows_table(record).splitlines() == [
        "| side | seeds | KL, nats per token | layers |",
        "| --- | ---: | ---: | ---: |",
        "| ours | 3 | 0.5 (0.25 to 0.75) | 12 |",
        "| theirs | 1 | 1234 | 24 |",
    ]


def test_a_bar_that_is_not_met_says_so_and_links_to_its_page(record: str) -> None:
    line = tables.bars_table(record, "page.md#{folder}").splitlines()[2]
    assert line == "| [KL](page.md#new) | 0.5 nats | <= 0.4 nats | **no** |"


def test_a_benchmark_without_protocol_is_a_section_all_the_same(record: str) -> None:
    section = tables.benchmark(record)
    assert section.startswith("**Why?**") and "X, 2 cores; 1 thread used" in section
    assert "| KL | 0.5 nats | <= 0.4 nats | **no** |" in section and section.endswith("Versions: a 1.")


def test_what_is_drawn_is_shown_in_one_line_of_its_own(record: str) -> None:
    assert "<figure>" not in tables.benchmark(record)
    (tables.ROOT / "benchmarks" / record / "plot.svg").write_text("<svg/>\n")
    assert "\n\n<figure><svg/></figure>\n\n" in tables.benchmark(record)


def test_the_summary_counts_bars_and_names_those_not_met(record: str) -> None:
    assert tables.summary_table().splitlines()[2:] == [
        "| [Why?](benchmarks/new/README.md) | 0 of 1 | KL: 0.5 nats (<= 0.4 nats) |"
    ]
