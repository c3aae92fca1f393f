"""The texts of a run: read, and cut into windows by the shares of their sources."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pocketsize.data.calibration import Windows, evaluation_windows, joined_windows, windows
from pocketsize.data.chat import chat_renderer
from pocketsize.data.sources import Source, apportion
from pocketsize.data.text import Corpus, default_corpora, joined, overlap, read_corpus
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.measurement.embedding import sentences
from pocketsize.models.load import tokenizer_of
from pocketsize.models.model import Model
from pocketsize.recipes.recipe import Data
from pocketsize.recipes.record import Finding, TextRecord

# Above this share of evaluation text seen in calibration, the report says so.
OVERLAP = 0.01
# So does it where no more than this share of the calibration windows differ.
REPEATS = 0.9


@dataclass(frozen=True, slots=True)
class Texts:
    """The calibration and evaluation text of a run, as tokens; `records` has one entry for each source.

    `corpus` is the text that evaluates, `train` the one that trainings read.
    """

    calibrate: Windows
    evaluate: Windows
    corpus: Corpus
    train: Corpus
    findings: tuple[Finding, ...]
    records: tuple[TextRecord, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """The text of one source, and how many windows it is to give."""

    corpus: Corpus
    share: float
    count: int


def read_texts(data: Data, base: Path, model: Model, *, trains: bool = False) -> Texts:
    """Calibration and evaluation windows, and what there is to say about them.

    Where something `trains`, the text it reads has an entry of its own; it is the calibration text unless
    other files were named for it.
    """
    tokenizer = tokenizer_of(model)
    length = min(data.length, model.positions)
    # Reading Python's documentation takes a second, so not where all texts were named.
    standard = (None, None) if data.calibrate and data.evaluate else default_corpora()
    count = data.sequences - data.written_windows
    first = _parts(data.calibrate, standard[0], count, tokenizer, (base, model.folder))
    second = _parts(data.evaluate, standard[1], -(-data.tokens // length), tokenizer, (base, model.folder))
    if len(second) > 1 and model.arch.task != "generate":
        raise UnsupportedError(
            "data: evaluate: shares are of windows, and encoders are evaluated on sentences; "
            "name the files in one list"
        )
    calibrate = [
        windows(p.corpus, tokenizer, count=p.count, length=length, seed=data.seed, special=True)
        for p in first
    ]
    evaluate = [
        evaluation_windows(p.corpus, tokenizer, tokens=p.count * length, length=length, special=True)
        for p in second
    ]
    corpora = [joined([p.corpus for p in parts]) for parts in (first, second)]
    findings = [*_about_length(data, length), *_about_overlap(*corpora)]
    findings += _about_counts("calibration", first, calibrate)
    findings += _about_repeats(torch.cat([w.input_ids for w in calibrate]))
    findings += _about_counts("evaluation", second, evaluate) if len(second) > 1 else []
    of = count / data.sequences
    records = [_record("calibrate", p.share * of, w) for p, w in zip(first, calibrate, strict=True)]
    if model.arch.task == "generate":
        records += [_record("evaluate", p.share, w) for p, w in zip(second, evaluate, strict=True)]
    else:
        records.append(_sentence_record(corpora[1], data.seed, tokenizer))
    train = _training_text(data, base, model, tokenizer) if data.train else corpora[0]
    findings += _about_overlap(train, corpora[1]) if data.train else []
    if trains:
        records.append(TextRecord("train", train.name, train.sha256, len(train.documents), 0, 0, 0))
    return Texts(
        joined_windows(calibrate, [p.share for p in first]),
        joined_windows(evaluate, [p.share for p in second]),
        corpora[1],
        train,
        tuple(findings),
        tuple(records),
    )


def _training_text(data: Data, base: Path, model: Model, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """All files that trainings were given; shares mean nothing there."""
    sources = [source for source in data.train if isinstance(source, Source)]
    sources = sources or [Source(tuple(name for name in data.train if isinstance(name, str)))]
    render = chat_renderer(tokenizer, model.folder)
    return joined([read_corpus(source, base, render) for source in sources])


def _parts(
    named: Sequence[str] | Sequence[Source],
    standard: Corpus | None,
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    places: tuple[Path, Path],
) -> list[_Part]:
    """The sources, each with its text and its number of windows; files without shares are one source."""
    if not named and standard is not None:
        return [_Part(standard, 1.0, count)]
    base, folder = places
    sources = [s for s in named if isinstance(s, Source)]
    sources = sources or [Source(tuple(f for f in named if isinstance(f, str)))]
    counts = apportion(count, [source.share for source in sources])
    for source, own in zip(sources, counts, strict=True):
        if not own:
            raise UsageError(
                f"data: {source.name}: share {source.share:g} of {count} windows is less than one; "
                "raise it, or ask for more"
            )
    render = chat_renderer(tokenizer, folder)
    return [
        _Part(read_corpus(source, base, render), source.share, own)
        for source, own in zip(sources, counts, strict=True)
    ]


def _about_length(data: Data, length: int) -> Iterator[Finding]:
    if length < data.length:
        message = f"windows of {length} tokens instead of {data.length}: the model reads no more"
        yield Finding("shorter-windows", message)


def _about_overlap(calibrate: Corpus, evaluate: Corpus) -> Iterator[Finding]:
    if (share := overlap(calibrate, evaluate)) > OVERLAP:
        yield Finding(
            "overlap",
            f"{share:.1%} of the evaluation text also stands in the calibration text: quality is overstated",
        )


def _about_counts(what: str, parts: Sequence[_Part], cut: Sequence[Windows]) -> Iterator[Finding]:
    """Sources that have less text than their share asks for."""
    total = sum(len(w.input_ids) for w in cut)
    for part, w in zip(parts, cut, strict=True):
        got, length = w.input_ids.shape
        if got < part.count:
            message = f"the {what} text gives {got} windows of {length} tokens, {part.count} were asked"
            share = f": its share is {got / total:.3g} instead of {part.share:g}" if len(parts) > 1 else ""
            yield Finding("little-text", message + share, part.corpus.name if len(parts) > 1 else "")


def _about_repeats(ids: Tensor) -> Iterator[Finding]:
    """Windows that say the same count once: what they add is weight, not knowledge."""
    distinct, total = len(torch.unique(ids, dim=0)), len(ids)
    if distinct <= REPEATS * total and total > 1:
        tokens = distinct * ids.shape[1]
        message = f"only {distinct} of {total} calibration windows differ: {tokens} tokens that tell anything"
        yield Finding("repeated-text", message)


def _record(role: str, share: float, w: Windows) -> TextRecord:
    n, length = w.input_ids.shape
    return TextRecord(role, w.name, w.sha256, w.documents, n, length, int(w.mask.sum()), share)


def _sentence_record(corpus: Corpus, seed: int, tokenizer: PreTrainedTokenizerBase) -> TextRecord:
    """What an encoder is evaluated on; there are too few sentences, or they are these."""
    chosen = sentences(corpus, seed)
    tokens = sum(len(ids) for ids in tokenizer(chosen).input_ids)
    digest = hashlib.sha256("\n".join(chosen).encode()).hexdigest()
    return TextRecord("evaluate", corpus.name, digest, len(corpus.documents), len(chosen), 0, tokens)
