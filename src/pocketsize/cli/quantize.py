"""`pocketsize quantize`: one method, one scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pocketsize.cli import options


@click.command(name="quantize")
@click.argument("model")
@options.scheme
@options.effort
@options.tune
@options.outcome
def command(model: str, target: str | None, out: Path, **rest: Any) -> None:
    """Quantize the linears of MODEL (and its embedding) in one step, measure, export, report."""
    from pocketsize.api import arch_of
    from pocketsize.cli.summary import carry_out

    carry_out(model, lambda: options.raw_steps(**rest, arch=lambda: arch_of(model)), target, out, rest)
