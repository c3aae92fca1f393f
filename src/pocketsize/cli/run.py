"""`pocketsize run`: an explicit recipe."""

from __future__ import annotations

from pathlib import Path

import click

from pocketsize.cli import options


@click.command(name="run")
@click.argument("recipe", type=click.Path(path_type=Path))
@options.output
@options.overwrite
@options.threads
@options.fetch
@options.as_json
def command(recipe: Path, out: Path, overwrite: bool, threads: int | None, fetch_: bool, json_: bool) -> None:
    """Run the recipe file RECIPE; if an earlier run of it into the same output was cut off, go on with it."""
    options.require_recipe(recipe)
    from pocketsize import api
    from pocketsize.cli.network import fetch_first
    from pocketsize.cli.summary import show, use_threads
    from pocketsize.recipes.recipe import read_recipe

    parsed = read_recipe(recipe)
    fetch_first(fetch_, parsed.source, json_=json_)
    use_threads(threads)
    show(api.run(parsed, out=out, overwrite=overwrite), json_=json_)
