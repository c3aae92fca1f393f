"""`pocketsize measure`: the table of measurements of a model, alone or against its original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pocketsize.cli import options

if TYPE_CHECKING:
    from pocketsize.data.calibration import Windows
    from pocketsize.data.text import Corpus
    from pocketsize.measurement.measurement import Measurement
    from pocketsize.measurement.quality import Quality
    from pocketsize.models.model import Model
    from pocketsize.quantization.kv import Cache

LENGTH = 512


@click.command(name="measure")
@click.argument("model")
@click.option("--against", metavar="TEACHER", help="The model that MODEL was made from.")
@click.option("--data", multiple=True, metavar="GLOB", help="Text to evaluate on (repeatable).")
@click.option(
    "--tokens", type=click.IntRange(min=1), default=32768, show_default=True, help="Tokens to evaluate."
)
@click.option(
    "--cache",
    metavar="NAMES",
    help="Caches of keys and values to try: q8_0,q4_0,q8_0/q4_0,kivi-2,kivi-k4v2-g32-r128-s4.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens for which the bytes of a cache are told. Default: all that the model reads.",
)
@options.threads
@options.fetch
@options.as_json
def command(
    model: str,
    against: str | None,
    data: tuple[str, ...],
    tokens: int,
    cache: str | None,
    context: int | None,
    threads: int | None,
    fetch_: bool,
    json_: bool,
) -> None:
    """Measure MODEL: quality, size, speed. A folder, a hub id, a sample, or a folder Pocketsize made.

    With --against, quality is what MODEL keeps of TEACHER. Alone, a language model has a
    perplexity and bits per byte, a classifier an accuracy on --data with labels; an encoder has a size and a
    speed. With --cache, what MODEL keeps of itself
    when its attention reads keys and values in fewer bits, and the bytes they take. A MODEL that has gates
    is measured with them too.
    """
    from pocketsize.cli.network import fetch_first
    from pocketsize.measurement.cache import parse_caches
    from pocketsize.measurement.quality import Quality
    from pocketsize.models.products import quick_products

    if context is not None and cache is None:
        raise click.UsageError("--context: tells the bytes of a cache; name one with --cache")
    caches = parse_caches(cache) if cache is not None else []
    fetch_first(fetch_, *filter(None, (model, against)), json_=json_)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    small = _open(model)
    original = _open(against) if against else small
    with quick_products():
        found = _quality(original, small, data, tokens)
        cached = _cached(small, caches, data, tokens, context) if caches else Quality((), ())
        gates = _gated(small, data, tokens, threads)
    own = (*found.measurements, *cached.measurements, *gates.measurements)
    rows = [*own, *_size_and_speed(original, small, Path(model))]
    protocol = list(dict.fromkeys((*found.protocol, *cached.protocol, *gates.protocol)))
    if json_:
        _print_json(rows, protocol)
    else:
        _print_table(rows, protocol, small.origin.name)


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


def _quality(original: Model, small: Model, data: Sequence[str], tokens: int) -> Quality:
    from dataclasses import replace

    from pocketsize.measurement.quality import Quality
    from pocketsize.measurement.suite import quality_of

    alone = small is original
    if small.arch.task == original.arch.task == "classify":
        return _classes(None if alone else original, small, data)
    if original.arch.task != small.arch.task:
        raise click.UsageError(f"{small.folder} and {original.folder} do different tasks; nothing to compare")
    if alone and small.arch.task != "generate":
        return Quality((), ())
    if not alone:
        _same_tokens(original, small)
    windows, corpus = _text(original, data, tokens)
    found = quality_of(original, small, windows, corpus, seed=0)
    if not alone:
        return found
    own = [replace(m, subject="model") for m in found.measurements if m.subject == "original"]
    return Quality(tuple(own), tuple(said for said in found.protocol if not said.startswith("KL ")))


def _classes(original: Model | None, small: Model, data: Sequence[str]) -> Quality:
    """How right a classifier is, or what a small one keeps of it; nothing of one alone without data."""
    from dataclasses import replace

    from pocketsize.data.text import default_corpora, read_corpus
    from pocketsize.measurement.classes import class_quality
    from pocketsize.measurement.quality import Quality

    if original is None and not data:
        return Quality((), ())
    if original is not None:
        _same_tokens(original, small)
    corpus = read_corpus(data, Path.cwd()) if data else default_corpora()[1]
    found = class_quality(original, small, corpus, seed=0)
    if original is not None:
        return found
    return replace(found, measurements=tuple(replace(m, subject="model") for m in found.measurements))


def _cached(
    model: Model, caches: Sequence[Cache], data: Sequence[str], tokens: int, context: int | None
) -> Quality:
    from pocketsize.measurement.cache import cache_quality
    from pocketsize.models.cached import cache_for

    for cache in caches:
        cache_for(model, cache)  # refuses before any text is read
    windows, _ = _text(model, data, tokens)
    return cache_quality(model, caches, windows, seed=0, context=context)


def _gated(model: Model, data: Sequence[str], tokens: int, threads: int | None) -> Quality:
    """What a model with gates keeps of itself with them, and the speed of both; nothing of others."""
    from dataclasses import replace

    from pocketsize.measurement.quality import Quality
    from pocketsize.models.gates import has_gates, read_gates

    if not has_gates(model.folder):
        return Quality((), ())
    import torch

    from pocketsize.measurement.gated import gated_quality, gated_speed
    from pocketsize.models.skeleton import materialise

    gates = read_gates(model)
    windows, _ = _text(model, data, tokens)
    found = gated_quality(model, gates, windows, seed=0)
    speed = gated_speed(
        materialise(model), model, gates, windows.input_ids, threads=threads or torch.get_num_threads()
    )
    return replace(found, measurements=(*found.measurements, *speed))


def _text(model: Model, data: Sequence[str], tokens: int) -> tuple[Windows, Corpus]:
    """The windows that a model is evaluated on, and the text they are of."""
    from pocketsize.data.calibration import evaluation_windows
    from pocketsize.data.chat import chat_renderer
    from pocketsize.data.text import default_corpora, read_corpus
    from pocketsize.models.load import tokenizer_of

    tokenizer = tokenizer_of(model)
    render = chat_renderer(tokenizer, model.folder)
    corpus = read_corpus(data, Path.cwd(), render) if data else default_corpora()[1]
    length = min(LENGTH, model.positions)
    return evaluation_windows(corpus, tokenizer, tokens=tokens, length=length, special=True), corpus


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
    from dataclasses import replace

    from pocketsize.measurement.size import sizes
    from pocketsize.measurement.suite import latency

    alone = source.suffix == ".gguf" and source.is_file()
    here = source if source.is_dir() else small.folder  # a GGUF is measured as a folder that it became
    files = [source] if alone else sorted(here.glob("*.gguf"))
    counts = {path.name: path.stat().st_size for path in files}
    stored = 0 if alone else sum(path.stat().st_size for path in here.glob("*.safetensors"))
    if stored and (small is not original or small.quantized):
        counts["."] = stored
    parameters = sum(math.prod(entry.shape) for entry in small.checkpoint.entries.values())
    speed = latency(original, files)
    if small is original:
        speed = [replace(m, subject="model") if m.subject == "original" else m for m in speed]
    return [*sizes(original.origin, counts, parameters), *speed]


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
        subject = "folder" if row.subject == "." else row.subject
        table.add_row(row.name.replace("_", " ") + mark, subject, _short(value), interval, unit)
    console.print(table, soft_wrap=False)
    for sentence in protocol:
        console.print(sentence)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
