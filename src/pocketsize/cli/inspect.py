"""`pocketsize inspect`: every tensor of a model, accounted for."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from pocketsize.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from pocketsize.models.ledger import Ledger, Row
    from pocketsize.models.model import Model, Origin


@click.command(name="inspect")
@click.argument("model")
@options.fetch
@options.as_json
def command(model: str, fetch_: bool, json_: bool) -> None:
    """Check MODEL and list what is inside: tensors by role, and what can be compressed.

    Every tensor is read: a missing, unexpected or misshapen one, a NaN or an infinity is an error. Of a
    model that was fetched, so is every file that no longer has the hash it came with.
    """
    from pocketsize.cli.network import fetch_first
    from pocketsize.io.hub.copies import require_whole
    from pocketsize.io.source import fetched_copy
    from pocketsize.models.ledger import ledger
    from pocketsize.models.load import load, tokenizer_of

    fetch_first(fetch_, model, json_=json_)
    if copy := fetched_copy(model):
        require_whole(copy, hashes=True)
    loaded = load(model)
    vocabulary = len(tokenizer_of(loaded))
    found = ledger(loaded)
    if json_:
        facts = {"origin": asdict(loaded.origin), "family": loaded.config.model_type}
        facts |= {"task": loaded.arch.task, "vocabulary": vocabulary, "refuses": loaded.arch.refuses}
        facts |= {"classes": list(_classes(loaded))} if loaded.arch.task == "classify" else {}
        facts |= asdict(found)
        click.echo(json.dumps(facts))
        return
    _show(loaded, found, vocabulary)


def _show(model: Model, found: Ledger, vocabulary: int) -> None:
    """Title lines, then the tensors by role and kind."""
    from pocketsize.cli.screen import screen

    origin = model.origin
    tied = "; the head is the embedding" if found.tied else ""
    revision = f", revision {_printable(origin.revision)}" if origin.revision else ""
    groups = ", ".join(str(group) for group in found.groups) or "none; use one scale per row"
    fit = f"groups that divide every width: {groups}"
    console = screen()
    for line in (
        f"{_printable(origin.name)}: {model.config.model_type}, to {model.arch.task}",
        *_already(origin),
        *(
            [f"classes: {', '.join(map(_printable, _classes(model)))}"]
            if model.arch.task == "classify"
            else []
        ),
        f"{origin.parameters:,} parameters, {vocabulary:,} tokens{tied}",
        f"{_megabytes(origin.source_bytes)} as downloaded, {_megabytes(origin.bf16_bytes)} in bf16",
        f"licence {_printable(origin.licence)}{revision}",
        f"nothing in it can be compressed: {model.arch.refuses}" if model.arch.refuses else fit,
    ):
        console.print(line)
    console.print(_table(model, found))


def _classes(model: Model) -> tuple[str, ...]:
    from pocketsize.measurement.classes import classes_named

    return classes_named(model)


def _already(origin: Origin) -> list[str]:
    """A line for what comes quantized."""
    if origin.dequantized_from is None:
        return []
    form = _printable(origin.dequantized_from)
    return [f"already quantized: {form}; figures are relative to its dequantized weights"]


def _table(model: Model, found: Ledger) -> Table:
    """One line per kind of tensor below its role; `*` stands for each block, and for each expert of one."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    numbers = re.compile(re.escape(model.arch.blocks) + r"\.\d+\.|(?<=experts\.)\d+\.")
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption=f"* stands for {model.blocks[0]} to {len(model.blocks) - 1}",
        caption_justify="left",
    )
    table.add_column("tensor", overflow="fold")
    for heading in ("shape", "type", "count", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    everything = sum(total.bytes for total in found.totals)
    for total in found.totals:
        share = f"{total.role}, {100 * total.bytes / everything:.1f} % of the bytes"
        size = Text(_megabytes(total.bytes), style="bold")
        table.add_row(Text(share, style="bold"), "", "", str(total.tensors), size)
        kinds: dict[tuple[str, tuple[int, ...], str], list[Row]] = {}
        for row in found.rows:
            if row.role == total.role:
                kinds.setdefault((numbers.sub("*.", row.name), row.shape, row.dtype), []).append(row)
        for (name, shape, dtype), same in kinds.items():
            size = Text(_megabytes(sum(row.bytes for row in same)))
            table.add_row(Text("  " + name), "x".join(map(str, shape)), dtype, str(len(same)), size)
    return table


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 50_000 else f"{count / 1e3:.1f} kB"


def _printable(text: str) -> str:
    """Text from a file, with nothing that a terminal would take for a command."""
    return "".join(c if c.isprintable() else "?" for c in text)
