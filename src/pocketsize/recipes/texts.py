"""The texts of a run: read, and cut into windows by the shares of their sources."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pocketsize.data.calibration import Windows, evaluation_windows, joined_windows, shortened, windows
from pocketsize.data.chat import chat_renderer
from pocketsize.data.labels import by_labels, class_numbers, file_of, held_out, is_labelled
from pocketsize.data.sources import Source, apportion
from pocketsize.data.text import Corpus, default_corpora, joined, overlap, read_corpus
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.measurement.classes import TEXTS, chosen_texts, classes_named
from pocketsize.measurement.embedding import sentences
from pocketsize.models.load import tokenizer_of
from pocketsize.models.model import Model
from pocketsize.recipes.recipe import Data
from pocketsize.recipes.record import Finding, TextRecord

# Above this share of evaluation text seen in calibration, the report says so.
OVERLAP = 0.01
# So does it where no more than this share of the calibration windows differ.
REPEATS = 0.9
# Text of no more kinds of tokens tells nothing.
FEW = 8
# Tokens of a window of labelled texts, which only stands for them where windows are asked for.
SHORT = 32
# Files that a finding names.
NAMED = 3


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


def read_texts(
    data: Data,
    base: Path,
    model: Model,
    *,
    calibrates: bool = True,
    trains: bool = False,
    outline: Model | None = None,
) -> Texts:
    """Calibration and evaluation windows, and what there is to say about them.

    Where something `trains`, the text it reads has an entry of its own; it is the calibration text unless
    other files were named for it. Where nothing `calibrates`, nothing is said of windows for that. `outline`
    is what the steps make of the model.
    """
    outline, tokenizer = outline or model, tokenizer_of(model)
    length, places = min(data.length, model.positions), (base, model.folder)
    named = _train(data, base, tokenizer, model.folder)
    task = outline.arch.task
    (*standard, train), findings = _standard(data, named, task, length)
    count = data.sequences - data.written_windows
    first = _parts(data.calibrate, standard[0], count, tokenizer, places)
    second = _parts(data.evaluate, standard[1], -(-data.tokens // length), tokenizer, places)
    if len(second) > 1 and task != "generate":
        raise UnsupportedError(
            "data: evaluate: shares are of windows, and encoders are evaluated on sentences; "
            "name the files in one list"
        )
    corpora = [joined([p.corpus for p in parts]) for parts in (first, second)]
    taught = (corpora[0] if train is None else train) if trains else None
    findings += _about_labels((model, outline), taught, corpora[1], data.seed)
    calibrate = [_calibrating(p, tokenizer, length, data.seed) for p in first]
    evaluate = [_judging(p, tokenizer, length, task) for p in second]
    findings += [*_about_length(data, length), *_about_overlap("calibration", *corpora)]
    findings += _about_windows((first, calibrate), (second, evaluate), calibrates=calibrates)
    records = _records(data, (first, calibrate), (second, evaluate), task, tokenizer)
    if train is not None and train.sha256 != corpora[0].sha256:
        findings += _about_overlap("training", train, corpora[1])
    train = corpora[0] if train is None else train
    if trains:
        records.append(TextRecord("train", train.name, train.sha256, len(train.documents), 0, 0, 0))
    whole = joined_windows(calibrate, [p.share for p in first])
    return Texts(
        whole if data.shortest == "auto" else shortened(whole, tokenizer, data.shortest),
        joined_windows(evaluate, [p.share for p in second]),
        corpora[1],
        train,
        tuple(findings),
        tuple(records),
    )


def with_own(texts: Texts, own: Int64[Tensor, "n length"], calibrate: int) -> Texts:
    """The texts with what the model wrote: so many windows calibrate, all of them may teach."""
    first, whole = own[:calibrate], texts.calibrate
    ids = torch.cat([whole.input_ids, first])
    mask = torch.cat([whole.mask, torch.ones_like(first, dtype=torch.bool)])
    records = [*texts.records, _own_record("calibrate", first, len(first) / len(ids))]
    if len(own) > calibrate:
        records.append(_own_record("train", own, 1.0))
    return replace(texts, records=tuple(records), calibrate=replace(whole, input_ids=ids, mask=mask))


def _train(data: Data, base: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Corpus | None:
    """The text that was named to train with."""
    if not data.train:
        return None
    named = [source for source in data.train if isinstance(source, Source)]
    sources = named or [Source(tuple(name for name in data.train if isinstance(name, str)))]
    render = chat_renderer(tokenizer, folder)
    return joined([read_corpus(source, base, render) for source in sources])


def _standard(
    data: Data, train: Corpus | None, task: str, length: int
) -> tuple[tuple[Corpus | None, Corpus | None, Corpus | None], list[Finding]]:
    """The texts that calibrate and evaluate where none were named, and what is left to train with."""
    findings: list[Finding] = []
    judge: Corpus | None = None
    if task == "classify" and train is not None and is_labelled(train) and not data.evaluate:
        name = train.name
        train, judge = held_out(train)
        told = f"no text to evaluate with was named: {len(judge.documents)} texts of {name} were held out"
        findings.append(Finding("held-out", told))
    calibrate = train if task == "classify" and train is not None and _fills(train, length) else None
    # Reading Python's documentation takes a second, so not where all texts were named.
    whole = (data.calibrate or calibrate) and (data.evaluate or judge)
    default = (None, None) if whole else default_corpora()
    return (calibrate or default[0], judge or default[1], train), findings


def _about_labels(
    models: tuple[Model, Model], train: Corpus | None, evaluate: Corpus, seed: int
) -> list[Finding]:
    """Refuses labels that a classifier will not know, and too few to judge by, before any work."""
    original, outline = models
    if outline.arch.task != "classify":
        return []
    classes = classes_named(outline)
    chosen_texts(evaluate, classes, seed)
    found: list[Finding] = []
    if train is not None and is_labelled(train):
        named, others = by_labels(train)
        class_numbers(named, classes)
        found += [] if others is None else [_unlabelled(others)]
    if is_labelled(evaluate):
        return found
    both = original.arch.task == "classify"
    way = "agreement stands for it" if both else "nothing is told of it; name labelled text as `evaluate`"
    said = f"the text to evaluate with has no labels: accuracy is not known, {way}"
    return [*found, Finding("no-labels", said)]


def _unlabelled(others: Corpus) -> Finding:
    """What is said of files without labels beside labelled ones: a mistyped column would look like it."""
    files = list(dict.fromkeys(map(file_of, others.documents)))
    more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
    said = f"{', '.join(files[:NAMED])}{more}: no labels, unlike other files that train"
    return Finding("unlabelled-text", f"{said}; a teacher teaches by them, labels alone do not")


def _calibrating(part: _Part, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> Windows:
    """The windows that calibrate."""
    return windows(part.corpus, tokenizer, count=part.count, length=length, seed=seed, special=True)


def _judging(part: _Part, tokenizer: PreTrainedTokenizerBase, length: int, task: str) -> Windows:
    """The windows that evaluate. They are for generators; labelled texts may be too few for a long one."""
    wide = min(length, SHORT) if task == "classify" else length
    return evaluation_windows(part.corpus, tokenizer, tokens=part.count * length, length=wide, special=True)


def _fills(corpus: Corpus, length: int) -> bool:
    """Whether a corpus surely fills a window: a token is rarely longer than eight letters."""
    return sum(len(document.text) for document in corpus.documents) >= 8 * length


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


def _records(
    data: Data,
    calibrate: tuple[Sequence[_Part], Sequence[Windows]],
    evaluate: tuple[Sequence[_Part], Sequence[Windows]],
    task: str,
    tokenizer: PreTrainedTokenizerBase,
) -> list[TextRecord]:
    """An entry for each source that calibrates or evaluates."""
    of = (data.sequences - data.written_windows) / data.sequences
    records = [_record("calibrate", p.share * of, w) for p, w in zip(*calibrate, strict=True)]
    if data.shortest != "auto":
        records = [_cut_down(one, data.shortest) for one in records]
    if task == "generate":
        return records + [_record("evaluate", p.share, w) for p, w in zip(*evaluate, strict=True)]
    corpus = joined([p.corpus for p in evaluate[0]])
    if task == "classify" and is_labelled(corpus):
        count = len(corpus.documents)
        return [*records, TextRecord("evaluate", corpus.name, corpus.sha256, count, min(count, TEXTS), 0, 0)]
    return [*records, _sentence_record(corpus, data.seed, tokenizer)]


def _about_length(data: Data, length: int) -> Iterator[Finding]:
    if length < data.length:
        message = f"windows of {length} tokens instead of {data.length}: the model reads no more"
        yield Finding("shorter-windows", message)


def _about_overlap(what: str, read: Corpus, evaluate: Corpus) -> Iterator[Finding]:
    if (share := overlap(read, evaluate)) > OVERLAP:
        said = f"{share:.1%} of the evaluation text also stands in the {what} text"
        yield Finding("overlap", f"{said}: quality is overstated")


Cut = tuple[Sequence[_Part], Sequence[Windows]]


def _about_windows(first: Cut, second: Cut, *, calibrates: bool) -> Iterator[Finding]:
    """Windows that are too few or say the same: those that calibrate, if any do, and those that judge."""
    if calibrates:
        yield from _about_counts("calibration", *first)
        yield from _about_repeats("calibration", torch.cat([w.input_ids for w in first[1]]))
    if len(second[0]) > 1:
        yield from _about_counts("evaluation", *second)
    yield from _about_repeats("evaluation", torch.cat([w.input_ids for w in second[1]]))


def _about_counts(what: str, parts: Sequence[_Part], cut: Sequence[Windows]) -> Iterator[Finding]:
    """Sources that have less text than their share asks for."""
    total = sum(len(w.input_ids) for w in cut)
    for part, w in zip(parts, cut, strict=True):
        got, length = w.input_ids.shape
        if got < part.count:
            message = f"the {what} text gives {got} windows of {length} tokens, {part.count} were asked"
            share = f": its share is {got / total:.3g} instead of {part.share:g}" if len(parts) > 1 else ""
            yield Finding("little-text", message + share, part.corpus.name if len(parts) > 1 else "")


def _about_repeats(what: str, ids: Tensor) -> Iterator[Finding]:
    """Windows that say the same count once: what they add is weight, not knowledge.

    So do those of a few tokens in turn, which begin at another place each.
    """
    distinct, total = len(torch.unique(ids, dim=0)), len(ids)
    if distinct <= REPEATS * total and total > 1:
        tokens = distinct * ids.shape[1]
        message = f"only {distinct} of {total} {what} windows differ: {tokens} tokens that tell anything"
        yield Finding("repeated-text", message)
    elif (kinds := len(torch.unique(ids))) <= FEW:
        yield Finding("repeated-text", f"the {what} text is {kinds} tokens again and again")


def _cut_down(record: TextRecord, shortest: int) -> TextRecord:
    """Windows that are cut shorter, where any are."""
    return replace(record, shortest=shortest) if shortest <= record.length // 2 else record


def _record(role: str, share: float, w: Windows) -> TextRecord:
    n, length = w.input_ids.shape
    return TextRecord(role, w.name, w.sha256, w.documents, n, length, int(w.mask.sum()), share)


def _sentence_record(corpus: Corpus, seed: int, tokenizer: PreTrainedTokenizerBase) -> TextRecord:
    """What an encoder is evaluated on; there are too few sentences, or they are these."""
    chosen = sentences(corpus, seed)
    tokens = sum(len(ids) for ids in tokenizer(chosen).input_ids)
    digest = hashlib.sha256("\n".join(chosen).encode()).hexdigest()
    return TextRecord("evaluate", corpus.name, digest, len(corpus.documents), len(chosen), 0, tokens)


def _own_record(role: str, own: Int64[Tensor, "n length"], share: float) -> TextRecord:
    digest = hashlib.sha256(own.numpy().tobytes()).hexdigest()
    count, length = own.shape
    return TextRecord(role, "written by the model itself", digest, count, count, length, own.numel(), share)
