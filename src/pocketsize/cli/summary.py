"""What a finished run looks like on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from pocketsize.api import Result
from pocketsize.measurement.measurement import Measurement
from pocketsize.recipes.recipe import Data


def use_threads(threads: int | None) -> None:
    """Fix the number of threads of everything that follows."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def formats(target: str | None) -> list[str] | None:
    """`gguf,folder` as a list."""
    return [word.strip() for word in target.split(",") if word.strip()] if target else None


def data_of(
    *,
    calibrate: Iterable[str],
    evaluate: Iterable[str],
    sequences: int,
    length: int,
    tokens: int,
    seed: int,
    **_: Any,
) -> Data:
    """The text options of a command as recipe data."""
    return Data(tuple(calibrate), tuple(evaluate), sequences, length, tokens, seed)


def show(result: Result, *, json_: bool) -> None:
    """The record as JSON, or a table of what was kept and where it lies."""
    if json_:
        record = result.record
        facts = {"folder": str(result.folder), "record": json.loads(record.to_json())}
        click.echo(json.dumps(facts))
        return
    console = Console(highlight=False)
    table = Table(title=f"{result.record.origin.name} before and after", title_justify="left")
    for heading in ("", "original", "compressed", "unit"):
        table.add_column(heading, justify="left" if heading in ("", "unit") else "right")
    for name, unit, before, after in _rows(result.record.measurements):
        table.add_row(name, before, after, unit)
    console.print(table)
    for a in result.record.artifacts:
        console.print(f"{a.format}: {result.folder / a.path} ({a.bytes / 1e6:.1f} MB)")
        for check in a.checks:
            console.print(f"  {check}")
    for finding in result.record.findings:
        console.print(f"finding: {finding.message}{f' ({finding.where})' if finding.where else ''}")
    console.print(f"report: {result.folder / 'report.html'}")


def _rows(measurements: Iterable[Measurement]) -> list[tuple[str, str, str, str]]:
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for m in measurements:
        text = (
            f"{m.value:.4g}"
            if m.low is None or m.high is None
            else f"{m.value:.4g} [{m.low:.4g}, {m.high:.4g}]"
        )
        if m.unit == "bytes":
            text = f"{m.value / 1e6:.1f} M"
        subject = m.subject if m.subject in ("original", "compressed") else f"compressed {m.subject}"
        label = m.name.replace("_", " ") + (f" of {m.subject}" if subject.startswith("compressed ") else "")
        rows.setdefault((label, m.unit), {})[subject.split(" ")[0]] = text
    return [
        (label, unit, cells.get("original", ""), cells.get("compressed", ""))
        for (label, unit), cells in rows.items()
    ]
