"""`pocketsize measure`: the table of measurements of a model, alone or against its original."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pocketsize.cli import options

if TYPE_CHECKING:
    from pocketsize.measurement.measurement import Measurement
    from pocketsize.measurement.quality import Quality
    from pocketsize.models.model import Model

LENGTH = 512


@click.command(name="measure")
@click.argument("model")
@click.option("--against", metavar="TEACHER", help="The model that MODEL was made from.")
@click.option("--data", multiple=True, metavar="GLOB", help="Text to evaluate on (repeatable).")
@click.option(
    "--tokens", type=click.IntRange(min=1), default=32768, show_default=True, help="Tokens to evaluate."
)
@options.threads
@options.fetch
@options.as_json
def command(
    model: str,
    against: str | None,
    data: tuple[str, ...],
    tokens: int,
    threads: int | None,
    fetch_: bool,
    json_: bool,
) -> None:
    """Measure MODEL: quality, size, speed. A folder, a hub id, a sample, or a folder Pocketsize made.

    With --against, quality is what MODEL keeps of TEACHER. Alone, a language model has a
    perplexity and bits per byte; an encoder has a size and a speed.
    """
    from pocketsize.cli.network import fetch_first

    fetch_first(fetch_, *filter(None, (model, against)), json_=json_)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    small = _open(model)
    original = _open(against) if against else small
    found = _quality(original, small, data, tokens)
    rows = [*found.measurements, *_size_and_speed(original, small, Path(model))]
    if json_:
        _print_json(rows, found.protocol)
    else:
        _print_table(rows, found.protocol, small.origin.name)


def _open(source: str) -> Model:
    """A model as it is loaded, or one that Pocketsize wrote, with its weights packed."""
    from pocketsize.exporting.read_back import read_folder
    from pocketsize.io.source import resolve
    from pocketsize.io.strictjson import read_json_object
    from pocketsize.models.load import load

    config = resolve(source) / "config.json"
    ours = config.exists() and config.with_name("record.json").exists()
    packed = ours and "quantization_config" in read_json_object(config)
    return _with_origin(read_folder(config.parent)) if packed else load(source)


def _with_origin(model: Model) -> Model:
    """The model with the origin that its record tells."""
    from dataclasses import replace

    from pocketsize.recipes.record import read_record

    return replace(model, origin=read_record(model.folder / "record.json").origin)


def _stored(model: Model) -> int:
    return sum(path.stat().st_size for path in model.folder.glob("*.safetensors"))


def _quality(original: Model, small: Model, data: Sequence[str], tokens: int) -> Quality:
    from dataclasses import replace

    from pocketsize.data.calibration import evaluation_windows
    from pocketsize.data.chat import chat_renderer
    from pocketsize.data.text import default_corpora, read_corpus
    from pocketsize.measurement.quality import Quality
    from pocketsize.measurement.suite import quality_of
    from pocketsize.models.load import tokenizer_of

    alone = small is original
    if original.arch.task != small.arch.task:
        raise click.UsageError(f"{small.folder} and {original.folder} do different tasks; nothing to compare")
    if alone and small.arch.task != "generate":
        return Quality((), ())
    tokenizer = tokenizer_of(original)
    if not alone:
        _same_tokens(original, small)
    render = chat_renderer(tokenizer, original.folder)
    corpus = read_corpus(data, Path.cwd(), render) if data else default_corpora()[1]
    length = min(LENGTH, original.positions)
    windows = evaluation_windows(corpus, tokenizer, tokens=tokens, length=length, special=True)
    found = quality_of(original, small, windows, corpus, seed=0)
    if not alone:
        return found
    own = [replace(m, subject="model") for m in found.measurements if m.subject == "original"]
    return Quality(tuple(own), tuple(said for said in found.protocol if not said.startswith("KL ")))


def _same_tokens(original: Model, small: Model) -> None:
    from pocketsize.errors import UnsupportedError
    from pocketsize.models.load import tokenizer_of

    first, second = (tokenizer_of(m).get_vocab() for m in (original, small))
    if differ := sorted(first.items() ^ second.items(), key=lambda item: (item[1], item[0])):
        token, number = differ[0]
        raise UnsupportedError(
            f"{small.folder}: its tokenizer differs from that of {original.folder}, first at id {number} "
            f"({token!r}); models are compared token by token"
        )


def _size_and_speed(original: Model, small: Model, source: Path) -> list[Measurement]:
    """Sizes of what lies at `source`, and the speed of each GGUF file there."""
    from pocketsize.measurement.size import sizes
    from pocketsize.measurement.suite import latency

    alone = source.suffix == ".gguf" and source.is_file()
    files = [source] if alone else sorted(small.folder.glob("*.gguf"))
    counts = {path.name: path.stat().st_size for path in files}
    if not alone and (small is not original or small.quantized):
        counts["."] = _stored(small)
    return [*sizes(original.origin, counts), *latency(original, files)]


def _print_json(rows: Sequence[Measurement], protocol: Sequence[str]) -> None:
    import json
    from dataclasses import asdict

    from pocketsize.measurement.machine import machine, versions

    facts = {
        "measurements": [asdict(row) for row in rows],
        "protocol": list(protocol),
        "machine": machine(),
        "versions": versions(),
    }
    click.echo(json.dumps(facts, allow_nan=False))


def _print_table(rows: Sequence[Measurement], protocol: Sequence[str], name: str) -> None:
    from rich.table import Table

    from pocketsize.cli.screen import screen

    console = screen()
    table = Table(title=name, title_justify="left")
    for heading in ("measurement", "of", "value", "95 % interval", "unit"):
        table.add_column(heading, justify="right" if heading in ("value", "95 % interval") else "left")
    for row in rows:
        interval = "" if row.low is None or row.high is None else f"{_short(row.low)} .. {_short(row.high)}"
        mark = "" if row.kind == "measured" else f" ({row.kind})"
        value, unit = (row.value / 1e6, "MB") if row.unit == "bytes" else (row.value, row.unit)
        table.add_row(row.name.replace("_", " ") + mark, row.subject, _short(value), interval, unit)
    console.print(table, soft_wrap=False)
    for sentence in protocol:
        console.print(sentence)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
