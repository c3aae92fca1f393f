"""`pocketsize chat`: talk to a finished model."""

from __future__ import annotations

from pathlib import Path

import click

from pocketsize.cli import options


@click.command(name="chat")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompt", help="Ask this one question, print the answer, and end.")
@click.option("--tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option("--cache", help="Types of keys and values in llama.cpp: q8_0, q4_0, q8_0/q4_0. Default: f16.")
@options.threads
def command(folder: Path, prompt: str | None, tokens: int, cache: str | None, threads: int | None) -> None:
    """Talk to the GGUF in FOLDER (or the GGUF file FOLDER) through llama.cpp, on this machine alone.

    An empty line, `exit`, Ctrl-D or Ctrl-C ends the talk. A long one goes on without its oldest parts.
    """
    from pocketsize.io.source import GATES
    from pocketsize.serving.chat import answer, converse

    if (folder / GATES).is_file():
        click.echo(f"llama.cpp runs without the gates in {folder / GATES}", err=True)

    if prompt is not None:
        click.echo(answer(folder, prompt, tokens=tokens, threads=threads, cache=cache))
        return
    converse(folder, tokens=tokens, threads=threads, cache=cache, ask=_ask, tell=click.echo)


def _ask() -> str:
    """The next line; the cursor is left on a line of its own where there is none."""
    try:
        return input("you: ")
    except (EOFError, KeyboardInterrupt):
        click.echo()
        raise
