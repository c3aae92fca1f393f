"""`pocketsize verify`: is a finished folder still what was made?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command(name="verify")
@click.argument("model", metavar="FOLDER")
@click.option("--llamacpp/--no-llamacpp", default=None, help="Run GGUF files in llama.cpp (if installed).")
@click.option("--json", "json_", is_flag=True, help="Print one JSON object.")
def command(model: str, llamacpp: bool | None, json_: bool) -> None:
    """Check FOLDER: hashes of files, every tensor, the tokenizer, and what the model answers.

    FOLDER may also be the hub id of a fetched model; its files are checked against their hashes.

    Ends with exit code 7 when something is not as it was made; with --json every check is told either way.
    """
    from rich.text import Text

    from pocketsize.cli.main import visible
    from pocketsize.cli.screen import screen
    from pocketsize.errors import IntegrityError, UsageError
    from pocketsize.exporting.verify import require_sound, verify_folder
    from pocketsize.io.source import fetched_copy

    folder = Path(model) if Path(model).is_dir() else fetched_copy(model)
    if folder is None:
        what = "is a file; name the folder it was written in" if Path(model).is_file() else "no such folder"
        raise UsageError(f"{model}: {what}")
    checks = verify_folder(folder, llamacpp=llamacpp)
    facts = {"ok": all(check.ok for check in checks), "checks": [asdict(check) for check in checks]}
    if json_ and facts["ok"]:
        click.echo(json.dumps(facts, indent=1))
    elif not json_:
        console = screen()
        for check in checks:
            mark = ("ok   ", "green") if check.ok else ("WRONG", "red")
            console.print(Text.assemble(mark, f" {visible(check.name)}: {visible(check.detail)}"))
    try:
        require_sound(checks)
    except IntegrityError as error:
        error.facts = facts
        raise
