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
@options.target
@options.dtype
@options.output
@options.overwrite
@options.texts
@options.threads
@options.fetch
@options.as_json
def command(model: str, target: str | None, out: Path, **rest: Any) -> None:
    """Quantize the linears of MODEL (and its embedding) in one step, measure, export, report."""
    from pocketsize import api
    from pocketsize.cli.network import fetch_first
    from pocketsize.cli.summary import data_of, formats, show, use_threads
    from pocketsize.recipes.recipe import Recipe, parse_step

    fetch_first(rest["fetch_"], model, json_=rest["json_"])
    use_threads(rest["threads"])
    steps = (parse_step(options.raw_step(**rest)),)
    exports = tuple(formats(target) or api.default_export(model, steps))
    recipe = Recipe(model, steps, exports, data_of(**rest), dtype=rest["dtype"])
    result = api.run(recipe, out=out, overwrite=rest["overwrite"])
    show(result, json_=rest["json_"])
