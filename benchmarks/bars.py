"""The record of a benchmark: what was asked, what came out, and which bars it clears."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from meter import today, write_json


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and the target it was promised to reach."""

    name: str
    value: float
    unit: str
    better: Literal["lower", "higher"]
    target: float

    @property
    def met(self) -> bool:
        """Whether the value is at the target or on its better side."""
        return self.value <= self.target if self.better == "lower" else self.value >= self.target

    def as_dict(self) -> dict[str, object]:
        """The bar as it stands in a record."""
        return {
            "name": self.name,
            "value": round(self.value, 4),
            "unit": self.unit,
            "better": self.better,
            "target": self.target,
            "met": Bar(self.name, round(self.value, 4), self.unit, self.better, self.target).met,
        }


def ratio_bars(rows: Mapping[str, Mapping[str, object]], target: float) -> list[Bar]:
    """A bar for the `ratio` of each row, by its name."""
    return [Bar(name, float(str(row["ratio"])), "ratio", "lower", target) for name, row in rows.items()]


def gain_bars(
    contests: Mapping[str, tuple[str, str]], losses: Mapping[str, Mapping[int, float]], seeds: Sequence[int]
) -> list[Bar]:
    """How much less the first of each contest loses than the second, in nats: the worst of all seeds.

    `losses` are by name and seed; a contest of which a seed is missing has no bar.
    """
    found = []
    for name, sides in contests.items():
        ours, control = (losses.get(side, {}) for side in sides)
        gains = [control[seed] - ours[seed] for seed in seeds if seed in ours and seed in control]
        if len(gains) == len(seeds):
            found.append(Bar(f"{name}, the worst of {len(seeds)} seeds", min(gains), "nats", "higher", 0.0))
    return found


def bar_of(stored: Mapping[str, Any]) -> Bar:
    """A bar as a record has it."""
    return Bar(*(stored[key] for key in ("name", "value", "unit", "better", "target")))


def not_run_again(
    path: Path, models: Container[str], bits: Container[int] | None = None
) -> tuple[list[dict[str, Any]], list[Bar], dict[str, str]]:
    """Rows and bars of a record's other models, and its versions; rows name the commit of then.

    With `bits`, other widths of these models stay, too.
    """
    before = json.loads(path.read_text()) if path.exists() else {"rows": [], "bars": [], "commit": ""}

    def stays(model: str, width: int | None) -> bool:
        return model not in models or (bits is not None and width is not None and width not in bits)

    rows = [one for one in before["rows"] if stays(one["model"], one.get("bits"))]
    bars = [bar_of(one) for one in before["bars"] if stays(*_subject(one["name"]))]
    return [{"commit": before["commit"][:7]} | one for one in rows], bars, before.get("versions", {})


def _subject(name: str) -> tuple[str, int | None]:
    """The model and the width that a bar is about: `MODEL, 4 bit, ...`, or `MODEL: ...`."""
    model, *rest = re.split("[,:]", name)
    width = re.match(r" (\d+) bit", rest[0]) if rest else None
    return model, int(width[1]) if width else None


def write_record(
    path: Path,
    *,
    question: str,
    threads: int,
    protocol: Sequence[str],
    versions: Mapping[str, str],
    rows: Sequence[Mapping[str, object]],
    bars: Sequence[Bar],
) -> None:
    """Write `record.json`; the machine and the commit are looked up here."""
    from pocketsize.measurement.machine import machine

    record = {
        "question": question,
        "date": today(),
        "commit": commit(path.parent),
        "machine": machine(),
        "versions": dict(sorted(versions.items())),
        "threads": threads,
        "protocol": list(protocol),
        "rows": list(rows),
        "bars": [bar.as_dict() for bar in bars],
    }
    write_json(path, record)


def commit(folder: Path) -> str:
    """The checked-out commit; a `+` marks sources that differ from it."""
    git = ["git", "-C", str(folder)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ":/src", ":/benchmarks/*.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
