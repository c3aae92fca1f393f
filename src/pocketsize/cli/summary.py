"""What a finished run looks like on the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from pocketsize import api
from pocketsize.api import Result
from pocketsize.cli.main import visible
from pocketsize.cli.network import fetch_first
from pocketsize.cli.screen import screen
from pocketsize.errors import UsageError
from pocketsize.measurement.measurement import Measurement
from pocketsize.recipes.recipe import Data, Recipe, parse_step

# Ratios that differ by less are told once.
NEARLY = 0.02


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
    written: str,
    train: Iterable[str] = (),
    **_: Any,
) -> Data:
    """The text options of a command as recipe data."""
    try:
        share = "auto" if written == "auto" else float(written)
    except ValueError as error:
        raise UsageError(f"--written is auto or a share such as 0.5, got {written!r}") from error
    return Data(tuple(calibrate), tuple(evaluate), sequences, length, tokens, seed, share, tuple(train))


def carry_out(
    model: str,
    raw: Callable[[], Iterable[Mapping[str, Any]]],
    target: str | None,
    out: Path,
    rest: Mapping[str, Any],
) -> None:
    """Run the steps that a command's options stand for on a model, and show what came of it."""
    fetch_first(rest["fetch_"], model, json_=rest["json_"])
    use_threads(rest["threads"])
    steps = tuple(parse_step(step) for step in raw())
    exports = tuple(formats(target) or api.default_export(model, steps))
    recipe = Recipe(model, steps, exports, data_of(**rest), dtype=rest["dtype"])
    show(api.run(recipe, out=out, overwrite=rest["overwrite"]), json_=rest["json_"])


def show(result: Result, *, json_: bool) -> None:
    """The record as JSON, or a table of what was kept and where it lies."""
    if json_:
        record = result.record
        facts = {"folder": str(result.folder), "record": json.loads(record.to_json())}
        click.echo(json.dumps(facts))
        return
    console = screen()
    console.print(f"{visible(result.record.origin.name)} before and after", style="italic")
    table = Table()
    for heading in ("", "original", "compressed", "unit"):
        table.add_column(heading, justify="left" if heading in ("", "unit") else "right")
    for name, unit, before, after in _rows(result.record.measurements):
        table.add_row(name, before, after, unit)
    console.print(table, soft_wrap=False)
    for line in _lines(result):
        console.print(visible(line))


def _lines(result: Result) -> Iterator[str]:
    """Where everything lies, what was checked, and what should be known."""
    for a in result.record.artifacts:
        yield f"{a.format}: {result.folder / a.path} ({_size(result.measurements, a.path, a.bytes)})"
        for check in a.checks:
            yield f"  {check.partition('; margins of')[0]}"
    for finding in result.record.all_findings:
        yield f"finding: {finding.message}{f' ({finding.where})' if finding.where else ''}"
    yield f"report: {result.folder / 'report.html'}"


def _rows(measurements: Iterable[Measurement]) -> list[tuple[str, str, str, str]]:
    """Name, unit, original, compressed; sizes of files are told below the table."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for m in measurements:
        if m.subject not in ("original", "compressed") or m.unit in ("bytes", "bits"):
            continue
        interval = "" if m.low is None or m.high is None else f" [{m.low:.3g}, {m.high:.3g}]"
        rows.setdefault((m.name.replace("_", " "), m.unit), {})[m.subject] = f"{m.value:.3g}{interval}"
    return [
        (name, unit, cells.get("original", ""), cells.get("compressed", ""))
        for (name, unit), cells in rows.items()
    ]


def _size(m: Mapping[str, Measurement], path: str, count: int) -> str:
    """`79.3 MB, 4.72 bits per weight, 3.40 x smaller than bf16, 6.80 x smaller than the download`."""
    words = [f"{count / 1e6:.1f} MB"]
    if (bits := m.get(f"bits_per_weight of {path}")) is not None:
        words.append(f"{bits.value:.2f} bits per weight")
    ratio, whole = (m.get(f"ratio_to_{name} of {path}") for name in ("bf16", "download"))
    if ratio is not None:
        words.append(_times(ratio.value, "bf16"))
        if whole is not None and abs(whole.value / ratio.value - 1) > NEARLY:
            words.append(_times(whole.value, "the download"))
    return ", ".join(words)


def _times(ratio: float, what: str) -> str:
    """How many times smaller, or larger."""
    if abs(ratio - 1) <= NEARLY:
        return f"as large as {what}"
    return f"{ratio:.2f} x smaller than {what}" if ratio > 1 else f"{1 / ratio:.2f} x larger than {what}"
