"""`pocketsize distill`: a smaller student of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pocketsize.cli import options


@click.command(name="distill")
@click.argument("model")
@click.option("--layers", type=int, help="Blocks that the student keeps of the model. Default: all of them.")
@click.option(
    "--pick",
    type=click.Choice(["even", "influence"]),
    default="even",
    show_default=True,
    help="Which blocks stay: evenly spaced ones, or those that change most what passes through them.",
)
@click.option(
    "--budget",
    help="How long it learns: tokens to read (500k, 2M), epochs over the text (3epochs), or minutes (30min). "
    "Default: 3epochs for classifiers, 2M for others.",
)
@click.option("--loss", help="forward_kl, reverse_kl, skew_kl, skew_reverse_kl or js. Default: forward_kl.")
@click.option(
    "--teacher", multiple=True, metavar="MODEL", help="Who teaches (repeatable). Default: MODEL itself."
)
@click.option(
    "--set",
    "set_",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other key of the recipe step distill, such as hidden=1 or rate=2e-4 (repeatable).",
)
@click.option(
    "--train",
    multiple=True,
    metavar="GLOB",
    help="Text to learn from (repeatable). Default: the calibration text.",
)
@options.outcome
def command(model: str, target: str | None, out: Path, **rest: Any) -> None:
    """Cut a student out of MODEL, teach it to say what MODEL says, measure, export, report."""
    from pocketsize.cli.summary import carry_out

    carry_out(model, lambda: options.raw_distill(**rest), target, out, rest)
