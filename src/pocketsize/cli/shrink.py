"""`pocketsize shrink`: a goal in, a finished model out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pocketsize.cli import options


@click.command(name="shrink")
@click.argument("model")
@click.option("--keep", metavar="SHARE", help="Least share of quality to keep, such as 95%.")
@click.option("--fit", metavar="SIZE", help="Largest size of the first target, such as 80MB.")
@click.option("--ratio", metavar="FACTOR", help="How many times smaller than the download, such as 4x.")
@click.option(
    "--mixed/--uniform",
    default=True,
    show_default=True,
    help="Widths of a generator matrix by matrix, by what each costs, or one width for all linears.",
)
@options.effort
@options.tune
@options.outcome
def command(
    model: str,
    keep: str | None,
    fit: str | None,
    ratio: str | None,
    target: str | None,
    out: Path,
    **rest: Any,
) -> None:
    """Make MODEL smaller to a goal, verify it, export it, report it.

    With no goal, 95 % of the quality is kept in the smallest form that does. Quality is the ratio
    of perplexities for generators and the Spearman correlation of similarities for encoders.
    """
    from pocketsize import api
    from pocketsize.cli.network import fetch_first
    from pocketsize.cli.summary import data_of, formats, show, use_threads

    fetch_first(rest["fetch_"], model, json_=rest["json_"])
    use_threads(rest["threads"])
    result = api.shrink(
        model,
        out=out,
        keep=keep,
        fit=fit,
        ratio=ratio,
        target=formats(target),
        data=data_of(**rest),
        dtype=rest["dtype"],
        effort=rest["effort"],
        tune=rest["tune"],
        mixed=rest["mixed"],
        overwrite=rest["overwrite"],
    )
    show(result, json_=rest["json_"])
