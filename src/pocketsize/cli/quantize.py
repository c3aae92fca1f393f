"""`pocketsize quantize`: one method, one scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pocketsize.cli import options


@click.command(name="quantize")
@click.argument("model")
@click.option("--method", default="gptq", show_default=True, help="gptq or rtn.")
@click.option("--scheme", default="W4A16", show_default=True, help="W8A16, W5A16, W4A16, W3A16 or W2A16.")
@click.option("--group", default="auto", show_default=True, help="Inputs per scale: a number, auto, or row.")
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="Grid without or with zeros. Default: what the exports store best.",
)
@click.option(
    "--embeddings",
    default="auto",
    show_default=True,
    help="Width of embedding and head: 8, 5, 4, auto or none.",
)
@click.option(
    "--damp",
    type=float,
    default=0.01,
    show_default=True,
    help="GPTQ's damping, a share of the mean Gram diagonal.",
)
@options.target
@options.dtype
@options.output
@options.overwrite
@options.texts
@options.threads
@options.fetch
@options.as_json
def command(model: str, method: str, target: str | None, out: Path, **rest: Any) -> None:
    """Quantize the linears of MODEL (and its embedding) in one step, measure, export, report."""
    from pocketsize import api
    from pocketsize.cli.network import fetch_first
    from pocketsize.cli.summary import data_of, formats, show, use_threads
    from pocketsize.recipes.recipe import Recipe, parse_step

    fetch_first(rest["fetch_"], model, json_=rest["json_"])
    use_threads(rest["threads"])
    step: dict[str, Any] = {
        "scheme": rest["scheme"],
        "group": _number(rest["group"], {"auto": "auto", "row": None}, "--group"),
        "symmetric": "auto" if rest["symmetric"] is None else rest["symmetric"],
        "embeddings": _number(rest["embeddings"], {"auto": "auto", "none": None}, "--embeddings"),
    }
    if method == "gptq":
        step["damp"] = rest["damp"]
    steps = (parse_step({method: step}),)
    exports = tuple(formats(target) or api.default_export(model))
    recipe = Recipe(model, steps, exports, data_of(**rest), dtype=rest["dtype"])
    result = api.run(recipe, out=out, overwrite=rest["overwrite"])
    show(result, json_=rest["json_"])


def _number(text: str, words: dict[str, Any], option: str) -> Any:
    if text in words:
        return words[text]
    if not text.isdigit():
        raise click.UsageError(f"{option}: a number or one of {', '.join(words)}, got {text!r}")
    return int(text)
