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
@options.as_json
def command(recipe: Path, out: Path, overwrite: bool, threads: int | None, json_: bool) -> None:
    """Run the recipe file RECIPE; if an earlier run of it into the same output was cut off, go on with it."""
    from pocketsize import api
    from pocketsize.cli.summary import show, use_threads
    from pocketsize.recipes.recipe import read_recipe

    use_threads(threads)
    show(api.run(read_recipe(recipe), out=out, overwrite=overwrite), json_=json_)
