"""`pocketsize plan`: memory, disk, time and sizes of a run before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pocketsize.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from pocketsize.recipes.plan import Plan

# Sizes that are told of a curve, about.
ROWS = 10
# What a recipe says itself, or what has nothing to do with it.
_FREE = ("model", "out", "fetch_", "threads", "json_", "curve")


@click.command(name="plan")
@click.argument("model", metavar="MODEL|RECIPE")
@options.scheme
@options.effort
@options.tune
@click.option("--keep", metavar="SHARE", help="Plan `shrink` with this least share of quality.")
@click.option("--fit", metavar="SIZE", help="Plan `shrink` with this largest size, such as 80MB.")
@click.option("--ratio", metavar="FACTOR", help="Plan `shrink` with this factor, such as 4x.")
@click.option(
    "--curve", is_flag=True, help="Measure what each width of each matrix costs, and tell KL by size."
)
@options.target
@options.dtype
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder the run would write; its disk is looked at. Default: here.",
)
@options.fetch
@options.texts
@options.threads
@options.as_json
@click.pass_context
def command(ctx: click.Context, model: str, target: str | None, out: Path, **rest: Any) -> None:
    """Tell memory, disk, time and sizes of a run of RECIPE, or of `quantize` or `shrink` on MODEL.

    One block is calibrated, quantized, saved and read back in a temporary folder. Exit code 0: the run
    fits; 4: something cannot be done; 5: there is no room, and the table says what would fit.
    """
    said = options.recipe_in(model)
    from pocketsize import api
    from pocketsize.cli.network import fetch_first
    from pocketsize.cli.summary import data_of, formats, use_threads
    from pocketsize.recipes.recipe import parse_step, read_recipe

    use_threads(rest["threads"])
    given = _given(ctx)
    goal = {word: rest[word] for word in ("keep", "fit", "ratio")}
    recipe = None if said is None else read_recipe(said)
    if recipe is not None and given:
        raise click.UsageError(_beside(given[0], model))
    fetch_first(rest["fetch_"], model if recipe is None else recipe.source, json_=rest["json_"])
    how: dict[str, Any] = {
        "export": formats(target),
        "data": data_of(**rest),
        "dtype": rest["dtype"],
        "curve": rest["curve"],
    }
    if recipe is not None:
        found = api.plan(recipe, out=out, curve=rest["curve"])
    elif any(word is not None for word in goal.values()):
        if clash := [name for name in given if name in _OF_STEP]:
            raise click.UsageError(f"{clash[0]}: a goal chooses the scheme itself; leave one of them out")
        found = api.plan(model, out=out, effort=rest["effort"], tune=rest["tune"], **how, **goal)
    else:
        steps = tuple(map(parse_step, options.raw_steps(**rest, arch=lambda: api.arch_of(model))))
        found = api.plan(model, steps, out=out, **how)
    if rest["json_"]:
        click.echo(found.to_json())
    else:
        _show(found)
    ctx.exit(found.exit_code)


_GOALS = ("--keep", "--fit", "--ratio")
_OF_STEP = (
    *("--method", "--scheme", "--group", "--symmetric", "--float-zeros"),
    *("--override", "--embeddings", "--damp", "--rotate"),
)


def _beside(option: str, recipe: str) -> str:
    """Why an option cannot stand beside a recipe, and the way out."""
    if option in _GOALS:
        return f"{option}: a recipe says its steps, no goal; `shrink MODEL` has one"
    return f"{option}: {recipe} says it itself; change it there"


def _given(ctx: click.Context) -> list[str]:
    """The options that were given and that a recipe would say itself."""
    return [
        p.opts[-1]
        for p in ctx.command.params
        if p.name not in _FREE and ctx.get_parameter_source(str(p.name)) is not ParameterSource.DEFAULT
    ]


def _show(found: Plan) -> None:
    from rich.table import Table

    from pocketsize.cli.screen import screen

    console = screen()
    for line in _exports(found):
        console.print(line)
    if found.stages:
        table = Table(title=f"{found.model}: what each stage takes", title_justify="left")
        for heading in ("stage", "memory", "a process beside it", "CPU time", "time"):
            table.add_column(heading, justify="left" if heading == "stage" else "right")
        for s in found.stages:
            beside = _mb(s.child_ram_bytes) if s.child_ram_bytes else ""
            table.add_row(s.name, _mb(s.ram_bytes), beside, _time(s.cpu_s), _time(s.time_s))
        console.print(table)
    if found.ways:
        console.print(_costs(found))
    for line in (*_totals(found), *_details(found)):
        console.print(line)


def _costs(found: Plan) -> Table:
    """What each size costs: widths chosen matrix by matrix, and all linears alike."""
    from rich.table import Table

    table = Table(title="KL predicted for rounding on searched grids, nats per token", title_justify="left")
    for heading in ("size", "KL", ""):
        table.add_column(heading, justify="right" if heading else "left")
    apart = max(1, len(found.curve) // ROWS)
    best = [replace(one, name="best widths within it") for one in found.curve[::-apart]]
    for way in sorted((*best, *found.ways), key=lambda way: (way.bytes, -way.kl)):
        table.add_row(_mb(way.bytes), f"{way.kl:.4g}", way.name)
    return table


def _exports(found: Plan) -> Iterator[str]:
    for export in found.exports:
        yield f"{export.format}: {_mb(export.bytes)} of weights in {export.path}"
    for one in found.impossible:
        asked = "cannot be written" if one.asked else "not among the exports, and could not be"
        yield f"{one.format}: {asked}: {one.reason}"


def _totals(found: Plan) -> Iterator[str]:
    if found.needed_ram_bytes is not None:
        left = "" if found.available_ram_bytes is None else f" of {_mb(found.available_ram_bytes)} available"
        yield f"memory: {_mb(found.needed_ram_bytes)}{left}"
        yield (
            f"disk: {_mb(found.peak_disk_bytes)} while it runs, {_mb(found.output_disk_bytes)} afterwards, "
            f"{_mb(found.free_disk_bytes)} free in {found.disk_folder}"
        )
    if found.time_s is not None:
        trials = f", if all {found.trials} schemes within the size are tried" if found.trials > 1 else ""
        yield f"time: {_time(found.time_s)}{trials}"


def _details(found: Plan) -> Iterator[str]:
    for kept in found.unquantized:
        yield f"unquantized: {kept.role}, {kept.tensors} tensors, {kept.parameters:,} parameters: {kept.why}"
    for finding in found.findings:
        yield f"finding: {finding.message}{f' ({finding.where})' if finding.where else ''}"
    if found.rehearsal:
        yield f"rehearsal: {found.rehearsal} ({_time(found.rehearsal_time_s)})"
    if found.way_out:
        yield f"does not fit: {found.way_out}"
    elif any(one.asked for one in found.impossible):
        yield "cannot be done: see the exports above"
    else:
        yield "fits"


def _mb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _time(seconds: float | None) -> str:
    from pocketsize.io.console import duration

    return "" if seconds is None else duration(seconds)
