"""How much of a classifier's behaviour is kept: its classes of held-out texts, and how many are right."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray
from torch import Tensor

from pocketsize.data.labels import class_numbers, is_labelled
from pocketsize.data.text import Corpus, require_evaluable
from pocketsize.errors import DataError, NumericalError, UnsupportedError
from pocketsize.measurement.embedding import BATCH, sentences
from pocketsize.measurement.measurement import Measurement
from pocketsize.measurement.quality import Quality, rounding_said
from pocketsize.measurement.stats import RESAMPLES, Interval, bootstrap, bootstrap_mean, bootstrap_ratio
from pocketsize.models.batches import in_batches
from pocketsize.models.device import working_device
from pocketsize.models.inputs import round_inputs
from pocketsize.models.load import tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.stream import stream, without_blocks

# Texts that are classified at most, and at least.
TEXTS, LEAST = 1000, 16
LENGTH = 512

Logits = Float64[ndarray, "n classes"]
Labels = Int64[ndarray, "n"]
Figure = tuple[str, float, Interval | None, str]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The texts that are classified, perhaps each with a second, and their classes where they are known."""

    texts: tuple[str, ...]
    pairs: tuple[str, ...] = ()
    labels: Labels | None = None


def class_quality(original: Model | None, compressed: Model, corpus: Corpus, *, seed: int) -> Quality:
    """Accuracy and macro F1 of two classifiers on the same labelled texts, and how often they agree.

    `above_chance` is (accuracy - c) / (1 - c), c what always naming the commonest class would reach; of
    `accuracy_ratio` the original's is the denominator. Text without labels gives agreement and divergence
    alone. Without an `original` that classifies, what is compared with it is left out.
    """
    require_evaluable(corpus)
    models = [model for model in (original, compressed) if model is not None]
    for model in models:
        if model.arch.task != "classify":
            raise UnsupportedError(f"{model.folder}: is no classifier; it gives texts no classes")
    if original is not None and (a := classes_named(original)) != (b := classes_named(compressed)):
        raise UnsupportedError(f"{compressed.folder}: its classes are {', '.join(b)}, not {', '.join(a)}")
    chosen = chosen_texts(corpus, classes_named(compressed), seed)
    length = min(LENGTH, *(model.positions for model in models))
    logits = [logits_of(model, chosen, length) for model in models]
    found = [] if original is None else list(_compared(logits[0], logits[1], seed))
    if chosen.labels is not None:
        subjects = ("original", "compressed")[-len(models) :]
        found += _scored([x.argmax(1) for x in logits], subjects, chosen.labels, seed)
    rows = [_row(figure, len(chosen.texts)) for figure in found]
    return Quality(tuple(rows), (*_protocol(corpus, chosen, length, seed), *rounding_said(compressed)))


def class_distance(
    original: Model, compressed: Model, ids: Int64[Tensor, "n s"], mask: Bool[Tensor, "n s"]
) -> float:
    """KL of the class probabilities of two classifiers, mean over windows, which count by their tokens."""
    batches = list(in_batches(ids, mask, BATCH * ids.shape[1]))
    x, y = (np.concatenate(_forward(model, batches)) for model in (original, compressed))
    return float(np.average(divergences(x, y), weights=mask.sum(1).numpy()))


def classes_named(model: Model) -> tuple[str, ...]:
    """The names of a classifier's classes, in the order of its logits."""
    names: dict[int, str] = dict(model.config.id2label or {})  # type: ignore[arg-type]
    return tuple(str(names[i]) for i in range(len(names)))


def chosen_texts(corpus: Corpus, classes: Sequence[str], seed: int) -> Chosen:
    """At most 1000 texts drawn by `seed`, with their classes; sentences of a corpus without labels."""
    if not is_labelled(corpus):
        return Chosen(tuple(sentences(corpus, seed)))
    labels, documents = class_numbers(corpus, classes), corpus.documents
    if len(documents) < LEAST:
        raise DataError(
            f"{corpus.name}: {len(documents)} labelled texts, {LEAST} are needed; give more, or name "
            "labelled texts of their own to evaluate with (`evaluate`)"
        )
    if len({*labels.tolist()}) < 2:
        raise DataError(
            f"{corpus.name}: all texts are of the class {classes[labels[0]]!r}, so nothing is told by naming "
            "it; evaluate with texts of two classes"
        )
    rows = sorted(random.Random(seed).sample(range(len(documents)), min(TEXTS, len(documents))))
    pairs = tuple(documents[i].pair for i in rows)
    texts = tuple(documents[i].text for i in rows)
    return Chosen(texts, pairs if any(pairs) else (), labels[rows])


def logits_of(model: Model, chosen: Chosen, length: int = LENGTH) -> Logits:
    """The logits of each text, float32, one block in memory at a time; long texts are cut at `length`."""
    tokenizer, length = tokenizer_of(model), min(length, model.positions)
    order = sorted(range(len(chosen.texts)), key=lambda i: len(chosen.texts[i]))
    # A causal classifier looks for the last token that is not padding, and may not know what padding is.
    size = 1 if model.config.pad_token_id is None else BATCH
    parts = [order[a : a + size] for a in range(0, len(order), size)]
    batches: list[tuple[Int64[Tensor, "b s"], Bool[Tensor, "b s"]]] = []
    for part in parts:
        firsts, seconds = ([text[i] for i in part] for text in (chosen.texts, chosen.pairs or chosen.texts))
        batch = tokenizer(
            firsts,
            seconds if chosen.pairs else None,
            padding=size > 1,
            padding_side="right",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        batches.append((batch["input_ids"], batch["attention_mask"].bool()))
    rows = np.empty((len(order), len(classes_named(model))))
    for part, found in zip(parts, _forward(model, batches), strict=True):
        rows[part] = found
    if not np.isfinite(rows).all():
        raise NumericalError(f"{model.folder}: logits of the evaluation texts are NaN or infinite")
    return rows


def _forward(
    model: Model, batches: Sequence[tuple[Int64[Tensor, "b s"], Bool[Tensor, "b s"]]]
) -> list[Logits]:
    module, device = without_blocks(model, model.weight), working_device()
    round_inputs(module, model.rounds)

    def logits(ids: Int64[Tensor, "b s"], mask: Bool[Tensor, "b s"]) -> Logits:
        return (
            module(input_ids=ids.to(device), attention_mask=mask.long().to(device))
            .logits.double()
            .cpu()
            .numpy()
        )

    return stream(module, model, model.weight, [partial(logits, *batch) for batch in batches])


def divergences(x: Logits, y: Logits) -> Float64[ndarray, "n"]:
    """KL(softmax x || softmax y) of each row, nats."""
    p, q = (torch.from_numpy(z).log_softmax(-1) for z in (x, y))
    return (p.exp() * (p - q)).sum(-1).numpy()


def macro_f1(labels: Labels, said: Labels) -> float:
    """The mean over the classes that occur, true or said, of 2 TP / (2 TP + FP + FN)."""
    size = int(max(labels.max(), said.max())) + 1
    true, claimed = (np.bincount(x, minlength=size) for x in (labels, said))
    hits = np.bincount(labels[labels == said], minlength=size)
    occurs = true + claimed > 0
    return float((2 * hits[occurs] / (true + claimed)[occurs]).mean())


def above_chance(labels: Labels, said: Labels) -> float:
    """(accuracy - c) / (1 - c), c the share of the commonest class: 0 for naming it always."""
    c = np.bincount(labels).max() / len(labels)
    return float(((labels == said).mean() - c) / (1 - c)) if c < 1 else 0.0


def _compared(x: Logits, y: Logits, seed: int) -> Iterator[Figure]:
    agrees, apart = (x.argmax(1) == y.argmax(1)).astype(np.float64), divergences(x, y)
    yield "agreement", float(agrees.mean()), bootstrap_mean(agrees, seed), "compressed"
    yield "class_kl", float(apart.mean()), bootstrap_mean(apart, seed), "compressed"


def _scored(said: Sequence[Labels], subjects: Sequence[str], labels: Labels, seed: int) -> Iterator[Figure]:
    n = len(labels)
    right = [(labels == one).astype(np.float64) for one in said]
    if len(right) == 2 and right[0].any():
        ratio, interval = right[1].mean() / right[0].mean(), bootstrap_ratio(right[1], right[0], seed)
        yield "accuracy_ratio", float(ratio), interval, "compressed"
    for subject, one in zip(subjects, right, strict=True):
        yield "accuracy", float(one.mean()), bootstrap_mean(one, seed), subject
    for name, score in (("macro_f1", macro_f1), ("above_chance", above_chance)):
        for subject, one in zip(subjects, said, strict=True):
            yield name, score(labels, one), bootstrap(n, _resampled(score, labels, one), seed), subject


def _resampled(
    score: Callable[[Labels, Labels], float], labels: Labels, said: Labels
) -> Callable[[ndarray], float]:
    return lambda draw: score(labels[draw], said[draw])


def _row(figure: Figure, n: int) -> Measurement:
    name, value, interval, subject = figure
    low, high = interval if interval else (None, None)
    unit, better, method = _TABLE[name]
    return Measurement(name, value, unit, better, method, subject, samples=n, low=low, high=high)


_TABLE: dict[str, tuple[str, Literal["lower", "higher"], str]] = {
    "accuracy_ratio": ("share", "higher", "accuracy of the compressed model over that of the original"),
    "accuracy": ("share", "higher", "texts whose likeliest class is their label"),
    "macro_f1": ("1", "higher", "F1 of each class that occurs, mean over classes"),
    "above_chance": ("1", "higher", "(accuracy - c) / (1 - c), c the share of the commonest class"),
    "agreement": ("share", "higher", "texts that both models put into the same class"),
    "class_kl": ("nats/text", "lower", "KL(original || compressed) of class probabilities, mean over texts"),
}


def _protocol(corpus: Corpus, chosen: Chosen, length: int, seed: int) -> tuple[str, ...]:
    kind = "sentences without labels" if chosen.labels is None else "labelled texts"
    return (
        f"Evaluation text: {corpus.name} (documents: {len(corpus.documents)}; SHA-256 {corpus.sha256}).",
        f"{len(chosen.texts)} {kind}, drawn with seed {seed}, cut at {length} tokens where they are longer; "
        "the models run in float32.",
        f"Intervals: 95 % percentile bootstrap over texts, {RESAMPLES} draws, seed {seed}.",
    )
