"""The `pocketsize` command: finds the word, runs it, turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import click

from pocketsize import __version__
from pocketsize.cli.network import seal
from pocketsize.errors import PocketsizeError, Stopped, did_you_mean

# A command is cli/<word>.py; its help line stands here so that `--help` imports none of them.
WORDS: Mapping[str, str] = MappingProxyType(
    {
        "shrink": "Make a model smaller to a goal: a size, a ratio, a share of quality to keep.",
        "run": "Run a recipe file; go on with an unfinished run of it.",
        "quantize": "Quantize with one method and one scheme.",
        "prune": "Set weights to zero, or take heads, channels and blocks away.",
        "finetune": "Train a model on text, or make an encoder a classifier of labelled text.",
        "distill": "Teach a smaller student to say what a model says.",
        "plan": "What a run will take and give, before it starts; one block is rehearsed.",
        "inspect": "What is inside a model, and what can be compressed.",
        "measure": "Quality of a model, or of a small one against its original.",
        "verify": "Check a finished folder: files, weights, tokenizer, behaviour.",
        "report": "Write the report page of a finished folder again.",
        "chat": "Talk to a finished model in the terminal, through llama.cpp.",
        "doctor": "What this machine can do, and the command that mends what is missing.",
        "fetch": "Bring a model here, from the hub or a sample; the only command that uses the network.",
    }
)


class Words(click.Group):
    """Commands by file name, imported when called; unknown words get the nearest known one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All words, in the order of the table."""
        return list(WORDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command behind a word."""
        if cmd_name not in WORDS:
            return None
        return importlib.import_module(f"pocketsize.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Like click's, with a hint."""
        if args and not args[0].startswith("-") and args[0] not in WORDS:
            raise click.UsageError(f"unknown command {args[0]!r}{did_you_mean(args[0], WORDS)}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Like click's, which would take a run that stopped for one that was broken off."""
        try:
            return super().invoke(ctx)
        except Stopped as stopped:
            ctx.exit(_fail(stopped.word, str(stopped), stopped.exit_code, ctx.obj))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(WORDS.items()))


@click.command(cls=Words, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pocketsize")
def command() -> None:
    """Takes a language model, makes it pocket-sized, and proves what was kept.

    MODEL is a folder in Hugging Face layout, a GGUF file, the hub id of a fetched model (OWNER/NAME,
    OWNER/NAME@REVISION), or a sample such as sample:smollm2-135m.
    """


def main(args: list[str] | None = None) -> int:
    """Run the command line; gives the exit code (as `errors.py` lists them)."""
    words = sys.argv[1:] if args is None else args
    if words[:1] != ["fetch"]:
        seal(keep_token="--fetch" in words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = command.main(args=words, prog_name="pocketsize", standalone_mode=False, obj=words)
    except PocketsizeError as error:
        return _fail(error.word, as_flags(str(error), words), error.exit_code, words, error.facts)
    except click.ClickException as error:
        return _fail("usage", _with_hint(error), 2, words)
    except (click.Abort, KeyboardInterrupt):
        return _fail("stopped", "stopped; run the same command again to go on", 130, words)
    except OSError as error:
        return _fail("resources", f"{error.filename or 'files'}: {error.strerror or error}", 5, words)
    except MemoryError:
        return _fail("resources", "out of memory; use fewer sequences or a shorter length", 5, words)
    except Exception as error:
        if os.environ.get("POCKETSIZE_DEBUG"):
            raise
        message = f"{type(error).__name__}: {error}; this is a bug of ours: POCKETSIZE_DEBUG=1 shows where"
        return _fail("bug", message, 70, words)
    # What `ctx.exit` was given; a command that just ends gives None.
    return code if isinstance(code, int) else 0


def entry() -> None:
    """The console script."""
    sys.exit(main())


def visible(line: str) -> str:
    """Names come from files: what a terminal would take for a command, hide or refuse is shown escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


# Commands whose options stand for the keys of a recipe's step, and keys whose options have other names.
_FLAGGED = ("quantize", "shrink", "plan")
_FLAGS = {
    "symmetric: true": "--symmetric",
    "symmetric: false": "--asymmetric",
    "float_zeros: true": "--float-zeros",
    "float_zeros: false": "--integer-zeros",
    "embeddings: null": "--embeddings none",
    "group: null": "--group row",
}


def as_flags(message: str, words: Sequence[str]) -> str:
    """What a message says to use, as options of the command where those were used, not a recipe."""
    if set(words[:1]).isdisjoint(_FLAGGED) or any(word.endswith((".yaml", ".yml")) for word in words):
        return message

    def flag(found: re.Match[str]) -> str:
        return f"use {_FLAGS.get(found[1], f'--{found[2]} {found[3]}')}"

    return re.sub(r"\buse ((symmetric|float_zeros|embeddings|group|scheme): (\w+))", flag, message)


def _fail(
    word: str, message: str, code: int, words: list[str], facts: Mapping[str, object] = MappingProxyType({})
) -> int:
    line = visible(" ".join(message.split()))
    if "--json" in words:
        click.echo(json.dumps({**facts, "error": word, "message": line, "exit_code": code}))
    click.echo(f"error[{word}]: {line}", err=True)
    return code


def _with_hint(error: click.ClickException) -> str:
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        known = [name for p in error.ctx.command.params for name in p.opts if name.startswith("--")]
        return f"unknown option {error.option_name!r}{did_you_mean(error.option_name, known)}"
    return error.format_message()


if __name__ == "__main__":
    entry()
