"""Quality of encoders: pooling, distances and ranks of the same sentences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModel

from oracles.ranks import spearman_slow
from pocketsize.data.text import Corpus, Document
from pocketsize.errors import DataError, UnsupportedError, UsageError
from pocketsize.measurement import embedding
from pocketsize.measurement.embedding import embedding_quality, keep_of, mean_pool, sentences, window_distance
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme
from tiny import write_tiny

WHO = ("The fox", "A dog", "My model", "This weight", "Every error")
WHAT = (
    "jumps over the lazy dog",
    "sleeps on",
    "answers in 2026 still",
    "fits in a pocket or two",
    "moves on to you",
)
TEXT = " ".join(f"{who} {what} and {other}." for who in WHO for what in WHAT for other in WHAT[:2])
CORPUS = Corpus("tales", (Document("a", TEXT),))


@pytest.fixture(scope="module", params=["bert", "mpnet"])
def model(request, tmp_path_factory) -> Model:
    return load(write_tiny(tmp_path_factory.mktemp(request.param), request.param))


def rounded(model: Model, bits: int) -> Model:
    return model.with_quantized({name: rtn(model.original(name), Scheme(bits, 32)) for name in model.linears})


def figures(original: Model, small: Model) -> dict[str, float]:
    return {m.name: m.value for m in embedding_quality(original, small, CORPUS, seed=0).measurements}


def test_windows_count_by_their_tokens(model):
    """Each alone, without padding."""
    small = rounded(model, 3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 90, (6, 24), generator=generator)
    lengths = [24, 6, 12, 6, 24, 3]
    mask = torch.arange(24) < torch.tensor(lengths)[:, None]
    alone = [
        window_distance(model, small, ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(lengths)
    ]
    wanted = np.average(alone, weights=lengths)
    assert window_distance(model, small, ids, mask) == pytest.approx(wanted, rel=1e-4)


def test_an_encoder_keeps_all_of_itself(model):
    got = figures(model, model)
    assert got["one_minus_cosine"] == 0
    assert got["spearman"] == pytest.approx(1)


def test_distances_and_ranks_equal_a_plain_computation(model, monkeypatch):
    monkeypatch.setattr(embedding, "SENTENCES", 16)
    small = rounded(model, 3)
    texts = sentences(CORPUS, 0, 16)
    monkeypatch.setattr(embedding, "sentences", lambda corpus, seed: texts)
    got = figures(model, small)
    reference = AutoModel.from_pretrained(model.folder).eval()
    tokenizer = tokenizer_of(model)
    both = []
    for weights in ({}, {name: w.dequantize() for name, w in small.quantized.items()}):
        reference.load_state_dict(weights, strict=False)
        with torch.no_grad():
            rows = [
                reference(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in texts
            ]
        both.append(torch.nn.functional.normalize(torch.stack(rows).double(), dim=-1))
    x, y = both
    assert got["one_minus_cosine"] == pytest.approx(float((1 - (x * y).sum(1)).mean()), rel=1e-3)
    pairs = [(i, j) for i in range(16) for j in range(i)]
    expected = spearman_slow(*[[float(v[i] @ v[j]) for i, j in pairs] for v in both])
    assert got["spearman"] == pytest.approx(expected, abs=1e-3)


def test_fewer_bits_lose_more_and_intervals_hold_their_values(model):
    found = [embedding_quality(model, rounded(model, bits), CORPUS, seed=0) for bits in (8, 2)]
    for quality in found:
        assert all(m.low <= m.value <= m.high for m in quality.measurements)
    distance = [quality.measurements[0].value for quality in found]
    assert 0 < distance[0] < distance[1] / 10
    assert keep_of(found[1].measurements, "embed") < keep_of(found[0].measurements, "embed") <= 1
    said = " ".join(found[0].protocol)
    assert "tales" in said and CORPUS.sha256 in said and "50 different sentences" in said


def test_padding_does_not_reach_the_mean():
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [99.0, 99.0]]])
    mask = torch.tensor([[True, True, False]])
    assert mean_pool(hidden, mask)[0].tolist() == pytest.approx([0.6, 0.8])


def test_sentences_are_different_of_some_length_and_drawn_by_the_seed():
    corpus = Corpus("c", (Document("a", TEXT + " Too short. " + TEXT), Document("b", "no " * 60)))
    found = sentences(corpus, 0)
    assert len(found) == len(set(found)) == 50
    assert sentences(corpus, 0, 20) == sentences(corpus, 0, 20) != sentences(corpus, 1, 20)
    assert all(6 <= len(s.split()) <= 40 for s in found)


def test_what_cannot_be_measured_is_refused(model, tmp_path):
    with pytest.raises(DataError, match="1 sentences of 6 to 40 words"):
        few = Corpus("few", (Document("a", "Only one sentence of six words."),))
        embedding_quality(model, model, few, seed=0)
    with pytest.raises(UsageError, match="never evaluate"):
        embedding_quality(model, model, Corpus("own", CORPUS.documents, generated=True), seed=0)
    llama = load(write_tiny(tmp_path / "llama", "llama"))
    with pytest.raises(UnsupportedError, match="is no encoder"):
        embedding_quality(llama, llama, CORPUS, seed=0)


def test_a_dead_encoder_is_an_error(model, monkeypatch):
    monkeypatch.setattr(embedding, "_embed", lambda *_: np.ones((50, 4)) / 2)
    with pytest.raises(Exception, match="equally similar"):
        embedding_quality(model, model, CORPUS, seed=0)
