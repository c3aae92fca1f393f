"""Tables of README.md from benchmarks/*/record.json: `python -m benchmarks.tables [--check]`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md"]
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def table(name: str) -> str:
    """The bars of one record, or of all of them, as a table."""
    records = [read(name)] if name != "all" else [read(p.parent.name) for p in sorted(paths())]
    lines = ["| measured | value | bar | met |", "| --- | ---: | ---: | --- |"]
    for folder, record in records:
        for bar in record["bars"]:
            sign = "<=" if bar["better"] == "lower" else ">="
            met = "yes" if bar["met"] else "**no**"
            value, target = (f"{bar[key]:.3g} {bar['unit']}".strip() for key in ("value", "target"))
            lines.append(
                f"| [{bar['name']}](benchmarks/{folder}/README.md) | {value} | {sign} {target} | {met} |"
            )
    return "\n".join(lines) + "\n"


def paths() -> list[Path]:
    """All records."""
    return list((ROOT / "benchmarks").glob("*/record.json"))


def read(folder: str) -> tuple[str, dict[str, Any]]:
    """A record with the folder it stands in."""
    return folder, json.loads((ROOT / "benchmarks" / folder / "record.json").read_text())


def main() -> int:
    """Write the tables; with --check, only say whether they are stale."""
    stale: list[str] = []
    for page in PAGES:
        text = page.read_text()
        fresh = MARK.sub(lambda m: m[1] + table(m[2]) + m[3], text)
        if fresh != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(fresh)
    if stale and "--check" in sys.argv:
        print(f"stale tables in {', '.join(stale)}: run python -m benchmarks.tables")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
