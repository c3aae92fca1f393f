"""Quality of language models: intervals hold their values, rows mean what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pocketsize.data.calibration import Windows, evaluation_windows, windows
from pocketsize.data.text import Corpus, Document
from pocketsize.errors import NumericalError, UsageError
from pocketsize.measurement.embedding import keep_of
from pocketsize.measurement.measurement import Measurement
from pocketsize.measurement.quality import measurements, quality
from pocketsize.measurement.tokens import TokenScores
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme
from tiny import write_tiny

CORPUS = Corpus(
    "tales", (Document("a", "A fox, a dog and a model that fits in a pocket met in 2026. " * 20),)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return load(write_tiny(tmp_path_factory.mktemp("llama"), "llama"))


@pytest.fixture(scope="module")
def held_out(model) -> Windows:
    return evaluation_windows(CORPUS, tokenizer_of(model), tokens=8 * 32, length=32, special=False)


def rounded(model: Model, bits: int) -> Model:
    return model.with_quantized({name: rtn(model.original(name), Scheme(bits, 32)) for name in model.linears})


def rows(found: tuple[Measurement, ...]) -> dict[tuple[str, str], Measurement]:
    return {(m.name, m.subject): m for m in found}


def test_intervals_hold_their_values_and_rows_agree_with_each_other(model, held_out):
    got = rows(quality(model, rounded(model, 3), held_out, seed=0).measurements)
    for m in got.values():
        assert m.low is not None and m.high is not None and m.low <= m.value <= m.high and m.samples == 8 * 31
    original, small = (got["perplexity", who].value for who in ("original", "compressed"))
    assert got["perplexity_ratio", "compressed"].value == pytest.approx(original / small)
    bits = 31 * 8 * math.log2(original) / int(held_out.text_bytes.sum())
    assert got["bits_per_byte", "original"].value == pytest.approx(bits)
    assert got["kl_p99", "compressed"].value > got["kl_mean", "compressed"].value > 0
    assert 0 < got["top1", "compressed"].value < 1
    assert keep_of(list(got.values()), "generate") == got["perplexity_ratio", "compressed"].value


def test_fewer_bits_lose_more(model, held_out):
    kl = [
        rows(quality(model, rounded(model, bits), held_out, seed=0, dtype=torch.float32).measurements)[
            "kl_mean", "compressed"
        ].value
        for bits in (8, 4, 2)
    ]
    assert 0 < kl[0] < kl[1] / 10 < kl[2] / 10


def test_a_model_keeps_all_of_itself(model, held_out):
    got = rows(quality(model, model, held_out, seed=0).measurements)
    assert got["kl_mean", "compressed"].value == got["kl_p99", "compressed"].value == 0
    assert got["top1", "compressed"].value == got["perplexity_ratio", "compressed"].value == 1


def test_the_same_seed_gives_the_same_numbers(model, held_out):
    first, again, other = (
        quality(model, rounded(model, 4), held_out, seed=s).measurements for s in (1, 1, 2)
    )
    assert first == again != other
    assert [m.value for m in first] == [m.value for m in other]


def test_the_protocol_says_what_was_done(model, held_out):
    text = " ".join(quality(model, model, held_out, seed=4, dtype=torch.float32).protocol)
    for said in (
        "tales",
        held_out.sha256,
        "8 windows of 32 tokens",
        "256 tokens",
        "no BOS",
        "float32",
        "seed 4",
    ):
        assert said in text


def test_one_window_has_no_interval(model):
    one = evaluation_windows(CORPUS, tokenizer_of(model), tokens=32, length=32, special=False)
    assert all(m.low is None and m.high is None for m in quality(model, model, one, seed=0).measurements)


def test_generated_text_never_evaluates(model):
    own = Corpus("own", CORPUS.documents, generated=True)
    own_windows = windows(own, tokenizer_of(model), count=2, length=32, seed=0, special=False)
    with pytest.raises(UsageError, match="never evaluate"):
        quality(model, model, own_windows, seed=0)


def test_percentile_is_over_tokens_and_windows_are_the_units(held_out):
    n = len(held_out.input_ids)
    kl = np.zeros(n * 31)
    kl[:31] = 5.0
    zeros, yes = np.zeros(n * 31), np.ones(n * 31, dtype=bool)
    scores = TokenScores(np.repeat(np.arange(n), 31), kl, np.stack([zeros, zeros]), yes)
    got = rows(tuple(measurements(scores, held_out, 0)))
    assert got["kl_p99", "compressed"].value == 5.0
    # All of the divergence is in one window: intervals over tokens would be four times narrower.
    assert got["kl_mean", "compressed"].low == 0.0
    assert got["kl_mean", "compressed"].high > 1.2


def test_a_perplexity_beyond_numbers_is_an_error(held_out):
    n = len(held_out.input_ids)
    nll = np.full((2, n), 800.0)
    scores = TokenScores(np.arange(n), np.zeros(n), nll, np.ones(n, dtype=bool))
    with pytest.raises(NumericalError, match="perplexity of the original"):
        list(measurements(scores, held_out, 0))


def test_what_was_not_measured_is_not_kept():
    with pytest.raises(UsageError, match="spearman was not measured"):
        keep_of([], "embed")
