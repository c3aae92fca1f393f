"""`pocketsize prune`: weights become zero, or whole parts go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pocketsize.cli import options


@click.command(name="prune")
@click.argument("model")
@click.option("--sparsity", metavar="SHARE", help="Weights of the linears that become zero. Default: 50%.")
@click.option("--pattern", help="Where zeros lie: unstructured, or n:m such as 2:4. Default: unstructured.")
@click.option(
    "--score", help="Which weights go: alps, sparsegpt, surgeon, taylor, wanda or magnitude. Default: alps."
)
@click.option(
    "--remove", metavar="SHARE", help="Instead of single weights, this share of the blocks' parameters goes."
)
@click.option(
    "--by",
    type=click.Choice(["width", "depth"]),
    help="What goes with --remove: heads and inner channels, or whole blocks. Default: width.",
)
@click.option(
    "--recover",
    metavar="BUDGET",
    help="Afterwards what is left learns from MODEL: tokens (500k, 2M), 3epochs or 30min.",
)
@click.option("--scheme", help="Afterwards GPTQ quantizes what is left: W4A16, W8A16 and so on.")
@click.option(
    "--set",
    "set_",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other key of the step that prunes, such as learn=20 or allocation=outliers (repeatable).",
)
@click.option(
    "--train",
    multiple=True,
    metavar="GLOB",
    help="Text that --recover learns from (repeatable). Default: the calibration text.",
)
@options.outcome
def command(model: str, target: str | None, out: Path, **rest: Any) -> None:
    """Prune MODEL: weights to zero, or heads, channels and blocks away; measure, export, report.

    Zeros make a model smaller where they are left out (--target sparse) and faster where a runtime skips
    them; what is removed whole makes it smaller and faster everywhere.
    """
    from pocketsize.cli.summary import carry_out

    carry_out(model, lambda: options.raw_prune(**rest), target, out, rest)
