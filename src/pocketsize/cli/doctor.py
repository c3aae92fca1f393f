"""`pocketsize doctor`: what this machine can do."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pocketsize.cli import options

if TYPE_CHECKING:
    from pocketsize.measurement.doctor import Diagnosis


@click.command(name="doctor")
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Where you mean to write. Default: this folder.",
)
@options.as_json
@click.pass_context
def command(ctx: click.Context, out: Path, json_: bool) -> None:
    """Say what this machine can do, and the command that mends what is missing.

    Ends with exit code 0 when a model can be shrunk here, else with 5.
    """
    from pocketsize.errors import ResourceError
    from pocketsize.measurement.doctor import diagnose

    found = diagnose(out)
    error = None
    if found.missing:
        first = found.missing[0]
        error = ResourceError(f"{first.name}: {first.found}; {first.mend}")
    if not json_:
        _show(found)
        if error:
            raise error
        return
    facts = {"ok": error is None, **found.facts, "instruction_sets": dict(found.instruction_sets)}
    facts |= {"parts": [asdict(part) for part in found.parts]}
    if error:
        facts |= {"error": error.word, "message": str(error), "exit_code": error.exit_code}
        click.echo(f"error[{error.word}]: {error}", err=True)
    click.echo(json.dumps(facts))
    ctx.exit(error.exit_code if error else 0)


def _show(found: Diagnosis) -> None:
    """Facts, then what was looked at; below each that is not there, the way to mend it."""
    from pocketsize.cli.screen import screen

    console = screen()
    facts = found.facts
    sets = " ".join(f"{name}{'' if there else ' (no)'}" for name, there in found.instruction_sets.items())
    for name, value in (
        ("system", facts["os"]),
        ("processor", f"{facts['cpu']}, {facts['cores']} cores"),
        ("instruction sets", sets or "not known without torch"),
        ("gpu", facts["gpu"] or "none; none is needed"),
        ("products", facts["products"] or "not known"),
    ):
        console.print(f"        {name}: {value}")
    for part in found.parts:
        mark = "ok" if part.ok else "MISSING" if part.needed else "absent"
        console.print(f"{mark:<7} {part.name}: {part.found}")
        if part.mend:
            console.print(f"        -> {part.mend}")
    console.print(f"a model {'cannot be shrunk here yet' if found.missing else 'can be shrunk here'}")
