"""How much of an encoder's behaviour is kept: the embeddings of held-out sentences."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from numpy import ndarray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pocketsize.data.text import Corpus, require_evaluable
from pocketsize.errors import DataError, NumericalError, UnsupportedError, UsageError
from pocketsize.measurement.measurement import Measurement
from pocketsize.measurement.quality import Quality, rounding_said
from pocketsize.measurement.stats import RESAMPLES, Interval, bootstrap, bootstrap_mean, dense, spearman
from pocketsize.models.batches import in_batches
from pocketsize.models.device import working_device
from pocketsize.models.inputs import round_inputs
from pocketsize.models.load import tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.stream import stream, without_blocks

SENTENCES = 256
LEAST = 16
WORDS = range(6, 41)
BATCH = 32


def embedding_quality(original: Model, compressed: Model, corpus: Corpus, *, seed: int) -> Quality:
    """Cosine distance and rank agreement of two encoders' embeddings of the same sentences.

    `one_minus_cosine` is the mean over sentences of 1 - cos(original, compressed). `spearman` is the
    rank correlation of the cosine similarities of all pairs of sentences: what search with the
    embeddings depends on; where the two have different widths it is all that can be told. Embeddings are
    means over unmasked tokens; everything runs in float32. Intervals are 95 % bootstrap intervals over
    sentences.
    """
    require_evaluable(corpus)
    for model in (original, compressed):
        if model.arch.task != "embed":
            raise UnsupportedError(f"{model.folder}: is no encoder; it has no sentence embeddings")
    chosen = sentences(corpus, seed)
    x, y = (_embed(model, tokenizer_of(model), chosen) for model in (original, compressed))
    said = (*_protocol(corpus, len(chosen), seed), *rounding_said(compressed))
    return Quality(tuple(_measurements(x, y, seed)), said)


def sentences(corpus: Corpus, seed: int, count: int = SENTENCES) -> list[str]:
    """At most `count` different sentences of 6 to 40 words, drawn by `seed`; fewer than 16 are an error."""
    found: dict[str, None] = {}
    for document in corpus.documents:
        for raw in re.split(r"(?<=[.!?])\s+|\n\s*\n", document.text):
            sentence = " ".join(raw.split())
            if len(re.findall(r"\w+", sentence)) in WORDS:
                found[sentence] = None
    if len(found) < LEAST:
        raise DataError(
            f"{corpus.name}: {len(found)} sentences of 6 to 40 words, {LEAST} are needed; "
            "give more text to evaluate with"
        )
    return random.Random(seed).sample(list(found), min(count, len(found)))


def mean_pool(hidden: Float[Tensor, "b s hidden"], mask: Bool[Tensor, "b s"]) -> Float64[Tensor, "b hidden"]:
    """The mean over unmasked positions, scaled to length 1, in float64."""
    kept = mask[..., None]
    return F.normalize((hidden.double() * kept).sum(1) / kept.sum(1), dim=-1)


def window_distance(
    original: Model, compressed: Model, ids: Int64[Tensor, "n s"], mask: Bool[Tensor, "n s"]
) -> float:
    """The mean over windows of 1 - cos of what two encoders make of each, float32.

    Windows count by their tokens. Where the two have different widths it is the mean squared difference of
    the similarities of all pairs of windows.
    """
    batches = list(in_batches(ids, mask))
    x, y = (torch.cat(embedded(model, batches)) for model in (original, compressed))
    share = mask.sum(1).double() / mask.sum()
    if x.shape != y.shape:
        return float(share @ (x @ x.T - y @ y.T).square() @ share)
    return float(share @ ((x - y) ** 2).sum(1) / 2)


def embedded(
    model: Model, batches: Sequence[tuple[Int64[Tensor, "b s"], Bool[Tensor, "b s"]]]
) -> list[Float64[Tensor, "b hidden"]]:
    """The embeddings of each batch of tokens, one block in memory at a time."""
    module, device = without_blocks(model, model.weight), working_device()
    round_inputs(module, model.rounds)

    def pooled(ids: Int64[Tensor, "b s"], mask: Bool[Tensor, "b s"]) -> Float64[Tensor, "b hidden"]:
        ids, mask = ids.to(device), mask.to(device)
        hidden = module(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return mean_pool(hidden, mask).cpu()

    return stream(module, model, model.weight, [partial(pooled, *batch) for batch in batches])


def _embed(
    model: Model, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Float64[ndarray, "n hidden"]:
    length = min(512, model.positions)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [order[a : a + BATCH] for a in range(0, len(order), BATCH)]
    batches: list[tuple[Int64[Tensor, "b s"], Bool[Tensor, "b s"]]] = []
    for index in parts:
        batch = tokenizer(
            [texts[i] for i in index], padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        batches.append((batch["input_ids"], batch["attention_mask"].bool()))
    rows = np.empty((len(texts), int(model.config.hidden_size)))
    for index, found in zip(parts, embedded(model, batches), strict=True):
        rows[index] = found.numpy()
    if not np.isfinite(rows).all():
        raise NumericalError(f"{model.folder}: embeddings of the evaluation sentences are NaN or infinite")
    return rows


def _measurements(
    x: Float64[ndarray, "n hidden"], y: Float64[ndarray, "n hidden"], seed: int
) -> list[Measurement]:
    n = len(x)
    # Ranks do not change when similarities become whole numbers, and are found faster in each draw.
    similar = [dense(np.triu(cosines) + np.triu(cosines, 1).T) for cosines in (x @ x.T, y @ y.T)]
    low, high = np.triu_indices(n, 1)
    rank = spearman(similar[0][low, high], similar[1][low, high])
    if not math.isfinite(rank):
        raise NumericalError(
            "all pairs of evaluation sentences are equally similar; rank correlation is not defined"
        )
    found = [_row("spearman", rank, bootstrap(n, _resampled(similar, (low, high)), seed), n)]
    if x.shape == y.shape:
        # Rows have length 1, so half the squared distance is 1 - cos, without its cancellation.
        distance = ((x - y) ** 2).sum(1) / 2
        mean = float(distance.mean())
        found.insert(0, _row("one_minus_cosine", mean, bootstrap_mean(distance, seed), n))
    return found


def _resampled(similar: list[ndarray], pairs: tuple[ndarray, ndarray]) -> Callable[[ndarray], float]:
    def statistic(draw: ndarray) -> float:
        i, j = draw[pairs[0]], draw[pairs[1]]
        # A sentence drawn twice is no pair with itself.
        i, j = i[i != j], j[i != j]
        return spearman(similar[0][i, j], similar[1][i, j])

    return statistic


def _row(name: str, value: float, interval: Interval | None, n: int) -> Measurement:
    low, high = interval if interval else (None, None)
    better, method = _TABLE[name]
    return Measurement(name, value, "1", better, method, "compressed", samples=n, low=low, high=high)


_TABLE: dict[str, tuple[Literal["lower", "higher"], str]] = {
    "one_minus_cosine": ("lower", "1 - cosine of the two models' embeddings, mean over sentences"),
    "spearman": ("higher", "rank correlation of all sentence-pair similarities, original against compressed"),
}


def _protocol(corpus: Corpus, n: int, seed: int) -> tuple[str, ...]:
    return (
        f"Evaluation text: {corpus.name} (documents: {len(corpus.documents)}; SHA-256 {corpus.sha256}).",
        f"{n} different sentences of {WORDS[0]} to {WORDS[-1]} words, drawn with seed {seed}; "
        f"{n * (n - 1) // 2} pairs of them.",
        "Embeddings are means over unmasked tokens, scaled to length 1; the models run in float32.",
        f"Intervals: 95 % percentile bootstrap over sentences, {RESAMPLES} draws, seed {seed}.",
    )


# What `--keep` means, by task; of several names the first that was measured.
_KEPT = {
    "generate": ("perplexity_ratio",),
    "embed": ("spearman",),
    "classify": ("accuracy_ratio", "agreement"),
}


def keep_of(measurements: Sequence[Measurement], task: str) -> float:
    """The share that was kept, as `--keep` means it: perplexity ratio, rank correlation for encoders,
    accuracy ratio for classifiers (agreement where no text had labels).
    """
    names = _KEPT[task]
    measured = {m.name: m.value for m in measurements if m.subject == "compressed"}
    if found := [measured[name] for name in names if name in measured]:
        return found[0]
    raise UsageError(f"{' or '.join(names)} was not measured, so the share kept is not known")
