"""Every record under benchmarks/ has the promised shape, and no bar claims what its value does not show."""

from __future__ import annotations

import datetime
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RECORDS = sorted((ROOT / "benchmarks").glob("*/record.json"))
SHAPE = {
    "question": str,
    "date": str,
    "commit": str,
    "machine": dict,
    "versions": dict,
    "threads": int,
    "rows": list,
    "bars": list,
}
BAR = {"name", "value", "unit", "better", "target", "met"}


def complaints(record: dict[str, Any]) -> list[str]:
    """What is wrong with a record, in sentences."""
    found = [
        f"{key} is not a {kind.__name__}" for key, kind in SHAPE.items() if type(record.get(key)) is not kind
    ]
    if found:
        return found
    found += [f"{key} is empty" for key in SHAPE if not record[key]]
    if not re.fullmatch(r"[0-9a-f]{40}\+?", record["commit"]):
        found.append(f"commit {record['commit']!r} is not a hash")
    try:
        datetime.date.fromisoformat(record["date"])
    except ValueError:
        found.append(f"date {record['date']!r} is not ISO 8601")
    names = [bar.get("name") for bar in record["bars"]]
    found += [f"bar {name!r} stands twice" for name in set(names) if names.count(name) > 1]
    return found + [text for bar in record["bars"] for text in bar_complaints(bar)]


def bar_complaints(bar: dict[str, Any]) -> list[str]:
    """What is wrong with one bar."""
    if set(bar) != BAR:
        return [f"bar {bar.get('name')!r} has keys {sorted(bar)}"]
    value, target = bar["value"], bar["target"]
    if not all(type(x) in (int, float) and math.isfinite(x) for x in (value, target)):
        return [f"bar {bar['name']!r}: value {value!r} or target {target!r} is not a number"]
    if bar["better"] not in ("lower", "higher"):
        return [f"bar {bar['name']!r}: better is {bar['better']!r}"]
    met = value <= target if bar["better"] == "lower" else value >= target
    return (
        [] if bar["met"] is met else [f"bar {bar['name']!r}: {value} against {target} says met={bar['met']}"]
    )


@pytest.mark.parametrize("path", RECORDS, ids=[path.parent.name for path in RECORDS])
def test_record(path: Path) -> None:
    assert complaints(json.loads(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", RECORDS, ids=[path.parent.name for path in RECORDS])
def test_a_record_stands_beside_its_script_and_its_words(path: Path) -> None:
    assert path.with_name("run.py").is_file()
    assert path.with_name("README.md").is_file()


def sound() -> dict[str, Any]:
    bar = {"name": "a", "value": 0.7, "unit": "ratio", "better": "lower", "target": 0.75, "met": True}
    return {
        "question": "?",
        "date": "2026-11-23",
        "commit": "0" * 40,
        "machine": {"cores": 2},
        "versions": {"torch": "2"},
        "threads": 1,
        "rows": [{}],
        "bars": [bar],
    }


def test_a_sound_record_passes() -> None:
    assert complaints(sound()) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"value": 0.8}, "met=True"),
        ({"better": "higher"}, "met=True"),
        ({"met": False}, "met=False"),
        ({"met": 1}, "met=1"),
        ({"value": float("nan")}, "not a number"),
        ({"better": "less"}, "better is"),
        ({"note": "!"}, "has keys"),
    ],
)
def test_a_false_bar_is_found(change: dict[str, object], says: str) -> None:
    record = sound()
    record["bars"][0].update(change)
    assert says in " ".join(complaints(record))


@pytest.mark.parametrize("key", sorted(SHAPE))
def test_a_missing_part_is_found(key: str) -> None:
    record = sound()
    del record[key]
    assert key in " ".join(complaints(record))
