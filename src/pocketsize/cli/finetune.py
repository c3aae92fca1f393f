"""`pocketsize finetune`: train a model on text, or make a classifier of an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pocketsize.cli import options


@click.command(name="finetune")
@click.argument("model")
@click.option(
    "--train",
    multiple=True,
    metavar="GLOB",
    help="Text to learn from; for encoders and classifiers rows with a text and a label (repeatable). "
    "Default for generators: the calibration text.",
)
@click.option(
    "--budget",
    help="How long it learns: tokens to read (500k, 2M), epochs over the text (3epochs), or minutes (30min). "
    "Default: 3epochs for classifiers, 2M for generators.",
)
@click.option(
    "--set",
    "set_",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other key of the recipe step finetune, such as rate=2e-5 or batch=16 (repeatable).",
)
@options.outcome
def command(model: str, target: str | None, out: Path, **rest: Any) -> None:
    """Train MODEL on text; of an encoder and labelled text it makes a classifier. Measure, export, report.

    Without --evaluate, a tenth of the labelled texts is held out to evaluate with.
    """
    from pocketsize.cli.summary import carry_out

    carry_out(model, lambda: options.raw_finetune(**rest), target, out, rest)
