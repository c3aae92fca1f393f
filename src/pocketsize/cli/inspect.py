"""`pocketsize inspect`: every tensor of a model, accounted for."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from pocketsize.cli import options

if TYPE_CHECKING:
    from pocketsize.models.ledger import Ledger, Row
    from pocketsize.models.model import Model


@click.command(name="inspect")
@click.argument("model")
@options.as_json
def command(model: str, json_: bool) -> None:
    """Check MODEL and list what is inside: tensors by role, and what can be compressed.

    Every tensor is read: a missing, unexpected or misshapen one, a NaN or an infinity is an error.
    """
    from pocketsize.models.ledger import ledger
    from pocketsize.models.load import load, tokenizer_of

    loaded = load(model)
    vocabulary = len(tokenizer_of(loaded))
    found = ledger(loaded)
    if json_:
        facts = {"origin": asdict(loaded.origin), "family": loaded.config.model_type}
        facts |= {"task": loaded.arch.task, "vocabulary": vocabulary} | asdict(found)
        click.echo(json.dumps(facts))
        return
    _show(loaded, found, vocabulary)


def _show(model: Model, found: Ledger, vocabulary: int) -> None:
    """Title lines, the tensors by kind, totals by role."""
    from rich.console import Console

    origin = model.origin
    console = Console(highlight=False)
    release = f", dequantized from {origin.dequantized_from}" if origin.dequantized_from else ""
    console.print(f"[bold]{_plain(origin.name)}[/]  {model.config.model_type}, to {model.arch.task}{release}")
    console.print(
        f"{origin.parameters:,} parameters, {len(model.blocks)} blocks, {vocabulary:,} tokens, "
        f"licence {_plain(origin.licence)}"
    )
    console.print(
        f"{_size(origin.source_bytes)} as downloaded, {_size(origin.bf16_bytes)} in bf16; "
        f"{'head tied to the embedding' if found.tied else 'no tied tensors'}"
    )
    console.print(_tensors(found.rows))
    console.print(_roles(found))
    groups = ", ".join(str(group) for group in found.groups)
    console.print(f"Groups that divide every width: {groups or 'none; use per-channel scales'}")


def _tensors(rows: tuple[Row, ...]):
    """One line per kind of tensor; the blocks' numbers are folded into `*`."""
    from rich.table import Table

    kinds: dict[tuple[str, tuple[int, ...], str, str], list[Row]] = {}
    for row in rows:
        kind = re.sub(r"\.\d+\.", ".*.", row.name)
        kinds.setdefault((kind, row.shape, row.dtype, row.role), []).append(row)
    table = Table(title="Tensors", title_justify="left")
    for heading in ("name", "shape", "dtype", "role"):
        table.add_column(heading, overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("bytes", justify="right")
    for (name, shape, dtype, role), same in kinds.items():
        size = f"{sum(row.bytes for row in same):,}"
        table.add_row(_plain(name), " x ".join(map(str, shape)), dtype, role, str(len(same)), size)
    return table


def _roles(found: Ledger):
    """One line per role, with its share."""
    from rich.table import Table

    table = Table(title="By role", title_justify="left")
    table.add_column("role")
    for heading in ("tensors", "parameters", "bytes", "share"):
        table.add_column(heading, justify="right")
    everything = sum(total.bytes for total in found.totals)
    for total in found.totals:
        share = f"{100 * total.bytes / everything:.1f} %"
        table.add_row(total.role, str(total.tensors), f"{total.parameters:,}", f"{total.bytes:,}", share)
    return table


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _plain(text: str) -> str:
    """Text from a file, with nothing that rich would read as markup or a terminal as a command."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else "?" for c in text))
