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
    default="2M",
    show_default=True,
    help="How long it learns: tokens to read (500k, 2M), epochs over the text (3epochs), or minutes (30min).",
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
@options.target
@options.dtype
@options.output
@options.overwrite
@options.texts
@options.threads
@options.fetch
@options.as_json
def command(model: str, target: str | None, out: Path, **rest: Any) -> None:
    """Cut a student out of MODEL, teach it to say what MODEL says, measure, export, report."""
    from pocketsize import api
    from pocketsize.cli.network import fetch_first
    from pocketsize.cli.summary import data_of, formats, show, use_threads
    from pocketsize.recipes.recipe import Recipe, parse_step

    fetch_first(rest["fetch_"], model, json_=rest["json_"])
    use_threads(rest["threads"])
    steps = tuple(parse_step(step) for step in options.raw_distill(**rest))
    exports = tuple(formats(target) or api.default_export(model, steps))
    recipe = Recipe(model, steps, exports, data_of(**rest), dtype=rest["dtype"])
    show(api.run(recipe, out=out, overwrite=rest["overwrite"]), json_=rest["json_"])
