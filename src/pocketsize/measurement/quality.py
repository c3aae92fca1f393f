"""How much of a language model's behaviour is kept on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from pocketsize.data.calibration import Windows
from pocketsize.errors import NumericalError, UsageError
from pocketsize.measurement.measurement import Measurement
from pocketsize.measurement.stats import RESAMPLES, Interval, bootstrap, bootstrap_ratio
from pocketsize.measurement.tokens import TokenScores, compare
from pocketsize.measurement.words import fewer_said, in_tokens_of, shared_tokens
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.model import Model

MODELS = ("original", "compressed")


@dataclass(frozen=True, slots=True)
class Quality:
    """Measurements, and the sentences that say how they were taken."""

    measurements: tuple[Measurement, ...]
    protocol: tuple[str, ...]


def quality(
    original: Model,
    compressed: Model,
    windows: Windows,
    *,
    seed: int,
    dtype: torch.dtype | None = None,
) -> Quality:
    """KL divergence, top-1 agreement, perplexity and bits per byte of two models on the same windows.

        KL = mean over tokens of  sum_v p(v) (log p(v) - log q(v)),     p original, q compressed

    The matrices of the blocks multiply in `dtype` (`forward_dtype()` if None), head and softmax run in
    float32, sums in float64. Every token but the first of a window is predicted from those before it.
    """
    if windows.generated:
        raise UsageError(f"{windows.name}: holds text that a model wrote; it may calibrate, never evaluate")
    dtype = dtype or forward_dtype()
    if (shared := shared_tokens(original, compressed)) is not None:
        windows = in_tokens_of(windows, original, compressed)
    scores = compare(original, compressed, windows, dtype, shared)
    said = (*protocol(windows, dtype, seed), *fewer_said(shared), *rounding_said(compressed))
    return Quality(tuple(measurements(scores, windows, seed)), said)


def rounding_said(model: Model) -> tuple[str, ...]:
    """That linears round what they read, where they do."""
    kinds = sorted({"float8" if scheme.floats else "int8" for scheme in model.rounds.values()})
    if not kinds:
        return ()
    said = f"{len(model.rounds)} linears of the compressed model round each token that they read"
    return (f"{said} to {' or '.join(kinds)}.",)


def protocol(windows: Windows, dtype: torch.dtype, seed: int) -> tuple[str, ...]:
    """How `quality` measures, as sentences for the record."""
    n, length = windows.input_ids.shape
    first = f"{windows.prefix} token of the tokenizer's own (BOS)" if windows.prefix else "nothing (no BOS)"
    return (
        f"Evaluation text: {windows.name} (documents: {windows.documents}; SHA-256 {windows.sha256}).",
        f"{n} windows of {length} tokens that do not overlap, {windows.tokens} tokens in all, "
        f"in the order of the text; in front of each: {first}.",
        "Each token but the first of a window is predicted from the true ones before it; "
        "models that are compared read the same tokens.",
        f"Matrices of the blocks multiply in {str(dtype).removeprefix('torch.')}; "
        "head and softmax run in float32, sums in float64.",
        "KL is KL(original || compressed), nats per token; its 99th percentile is over tokens.",
        "Bits per byte: negative log2-likelihood over the UTF-8 bytes of the decoded predicted tokens.",
        f"Intervals: 95 % percentile bootstrap over windows, {RESAMPLES} draws, seed {seed}.",
    )


def measurements(scores: TokenScores, windows: Windows, seed: int) -> Iterator[Measurement]:
    """The scores of all tokens as measurements with intervals."""
    n = len(windows.input_ids)
    counts = _per_window(np.ones(len(scores.kl)), scores, n)
    text_bytes = windows.text_bytes.double().numpy()

    def mean_interval(values: Float[ndarray, "t"], per: Float[ndarray, "n"] = counts) -> Interval | None:
        return bootstrap_ratio(_per_window(values, scores, n), per, seed)

    def row(name: str, value: float, interval: Interval | None, subject: str = "compressed") -> Measurement:
        return _row(name, value, interval, len(scores.kl), subject)

    agrees, gain = scores.agrees.astype(np.float64), scores.nll[0] - scores.nll[1]
    yield row("kl_mean", scores.kl.mean(), mean_interval(scores.kl))
    yield row("kl_p99", float(np.quantile(scores.kl, 0.99)), _quantile_interval(scores, n, seed))
    yield row("top1", agrees.mean(), mean_interval(agrees))
    for subject, nll in zip(MODELS, scores.nll, strict=True):
        yield row("perplexity", _exp(nll.mean(), subject), _exp_both(mean_interval(nll)), subject)
    yield row("perplexity_ratio", _exp(gain.mean(), "compressed"), _exp_both(mean_interval(gain)))
    for subject, nll in zip(MODELS, scores.nll, strict=True):
        bits = nll / math.log(2)
        yield row("bits_per_byte", bits.sum() / text_bytes.sum(), mean_interval(bits, text_bytes), subject)


def _row(name: str, value: float, interval: Interval | None, tokens: int, subject: str) -> Measurement:
    unit, better, method = _TABLE[name]
    low, high = interval if interval else (None, None)
    return Measurement(name, float(value), unit, better, method, subject, samples=tokens, low=low, high=high)


_TABLE: dict[str, tuple[str, Literal["lower", "higher"], str]] = {
    "kl_mean": ("nats/token", "lower", "KL(original || compressed), mean over tokens"),
    "kl_p99": ("nats/token", "lower", "KL(original || compressed), 99th percentile over tokens"),
    "top1": ("share", "higher", "tokens where both models put the same token first"),
    "perplexity": ("perplexity", "lower", "exp of the mean negative log-likelihood per token"),
    "perplexity_ratio": ("share", "higher", "perplexity of the original over that of the compressed model"),
    "bits_per_byte": ("bits/byte", "lower", "negative log2-likelihood over UTF-8 bytes"),
}


def _per_window(values: Float[ndarray, "t"], scores: TokenScores, n: int) -> Float[ndarray, "n"]:
    return np.bincount(scores.window, weights=values, minlength=n)


def _quantile_interval(scores: TokenScores, n: int, seed: int) -> Interval | None:
    parts = [scores.kl[scores.window == i] for i in range(n)]
    return bootstrap(n, lambda draw: float(np.quantile(np.concatenate([parts[i] for i in draw]), 0.99)), seed)


def _exp(mean: float, subject: str) -> float:
    if mean > 700:
        raise NumericalError(
            f"the perplexity of the {subject} model is beyond any number (exp of {mean:.0f})"
        )
    return math.exp(mean)


def _exp_both(interval: Interval | None) -> Interval | None:
    return None if interval is None else (math.exp(interval[0]), math.exp(min(interval[1], 700.0)))
