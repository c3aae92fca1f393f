"""The quality of classifiers: scores against their oracles, and what two models are told apart by."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from oracles.classes import above_chance_slow, macro_f1_slow
from pocketsize.data.text import Corpus, Document
from pocketsize.errors import DataError, UnsupportedError, UsageError
from pocketsize.measurement.classes import (
    above_chance,
    chosen_texts,
    class_distance,
    class_quality,
    classes_named,
    divergences,
    logits_of,
    macro_f1,
)
from pocketsize.measurement.embedding import keep_of
from pocketsize.measurement.suite import divergence, latency, quality_of
from pocketsize.models.load import load
from pocketsize.recipes.quantize import Rtn
from tiny import write_tiny

CLASSES = ("ham", "spam", "eggs")
WORDS = ["quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "is", "small", "fits", "pocket"]


def labelled(count: int = 60, *, pairs: bool = False) -> Corpus:
    draw = random.Random(0)
    rows = [" ".join(draw.choices(WORDS, k=draw.randint(3, 30))) for _ in range(2 * count)]
    documents = (
        Document(f"row {i}", rows[i], CLASSES[i % 3], rows[count + i] if pairs else "") for i in range(count)
    )
    return Corpus("set", tuple(documents))


def by_name(quality) -> dict[tuple[str, str], float]:
    return {(m.name, m.subject): m.value for m in quality.measurements}


def test_scores_are_those_of_the_oracle() -> None:
    draw = np.random.default_rng(0)
    for classes in (2, 3, 9):
        labels, said = draw.integers(0, classes, 40), draw.integers(0, classes + 1, 40)
        assert macro_f1(labels, said) == pytest.approx(macro_f1_slow(labels.tolist(), said.tolist()))
        assert above_chance(labels, said) == pytest.approx(above_chance_slow(labels.tolist(), said.tolist()))
    labels = np.array([0, 0, 1])
    assert above_chance(labels, np.zeros(3, int)) == 0 and above_chance(labels, labels) == 1


def test_divergences_are_kl_and_zero_where_models_agree() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 5, 4))
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (x, y))
    assert divergences(x, y) == pytest.approx((p * np.log(p / q)).sum(1))
    assert divergences(x, x + 3) == pytest.approx(np.zeros(5), abs=1e-12)


@pytest.mark.parametrize("family", ["bert", "mpnet", "mobilebert", "squeezebert", "llama"])
@pytest.mark.parametrize("pairs", [False, True])
def test_logits_are_those_of_stock_transformers_one_text_at_a_time(
    family: str, pairs: bool, tmp_path: Path
) -> None:
    model = load(write_tiny(tmp_path, family, classes=CLASSES))
    chosen = chosen_texts(labelled(20, pairs=pairs), classes_named(model), 0)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    found = logits_of(model, chosen)
    for i, text in enumerate(chosen.texts):
        inputs = tokenizer(text, chosen.pairs[i] if pairs else None, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            expected = stock(**inputs).logits[0]
        assert found[i] == pytest.approx(expected.numpy(), abs=2e-4)


def test_a_model_agrees_with_itself_and_a_coarse_one_less(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path, "bert", classes=CLASSES))
    coarse = Rtn(scheme="W2A16", embeddings=None).resolve(model, ("folder",))
    from exporting.test_families import Memory
    from pocketsize.recipes.step import Context

    none = torch.zeros(1, 8, dtype=torch.int64)
    small = coarse.apply(model, Context(none, none.bool(), Memory(), lambda *_: None))
    same, apart = (by_name(quality_of(model, m, None, labelled(), seed=0)) for m in (model, small))  # type: ignore[arg-type]
    assert same["agreement", "compressed"] == 1 and same["class_kl", "compressed"] == 0
    assert same["accuracy_ratio", "compressed"] == 1
    assert apart["class_kl", "compressed"] > 0
    assert apart["accuracy", "original"] == same["accuracy", "original"]
    ids = torch.randint(5, 300, (6, 12))
    assert divergence(model, small, ids, ids > 0) == class_distance(model, small, ids, ids > 0) > 0
    assert divergence(model, model, ids, ids > 0) == 0


def test_intervals_hold_their_values_and_the_protocol_says_how(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path, "distilbert", classes=CLASSES))
    quality = class_quality(model, model, labelled(), seed=1)
    for m in quality.measurements:
        assert m.low is not None and m.high is not None and m.low <= m.value <= m.high and m.samples == 60
    assert "60 labelled texts, drawn with seed 1" in " ".join(quality.protocol)
    assert {m.name for m in latency(model, [])} == {"input_time", "sentence_rate"}


def test_text_without_labels_tells_agreement_alone(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path, "bert", classes=CLASSES))
    text = " ".join(f"The {a} fox saw a {b} dog and slept on." for a in WORDS for b in WORDS)
    quality = class_quality(model, model, Corpus("plain", (Document("a", text),)), seed=0)
    assert {m.name for m in quality.measurements} == {"agreement", "class_kl"}
    assert "sentences without labels" in " ".join(quality.protocol)
    assert keep_of(quality.measurements, "classify") == 1


def test_a_classifier_alone_is_scored_alone(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "c", "bert", classes=CLASSES))
    encoder = load(write_tiny(tmp_path / "e", "bert"))
    for quality in (
        class_quality(None, model, labelled(), seed=0),
        quality_of(encoder, model, None, labelled(), seed=0),  # type: ignore[arg-type]
    ):
        assert {m.name for m in quality.measurements} == {"accuracy", "macro_f1", "above_chance"}
        assert {m.subject for m in quality.measurements} == {"compressed"}
        with pytest.raises(UsageError, match="accuracy_ratio or agreement was not measured"):
            keep_of(quality.measurements, "classify")


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "c", "bert", classes=CLASSES))
    other = load(write_tiny(tmp_path / "o", "bert", classes=("a", "b")))
    encoder = load(write_tiny(tmp_path / "e", "bert"))
    with pytest.raises(UnsupportedError, match="is no classifier"):
        class_quality(model, encoder, labelled(), seed=0)
    with pytest.raises(UnsupportedError, match="its classes are a, b, not ham, spam, eggs"):
        class_quality(model, other, labelled(), seed=0)
    with pytest.raises(DataError, match="3 labelled texts, 16 are needed"):
        class_quality(model, model, labelled(3), seed=0)
    one = replace(labelled(), documents=tuple(replace(d, label="ham") for d in labelled().documents))
    with pytest.raises(DataError, match="all texts are of the class 'ham'"):
        class_quality(model, model, one, seed=0)
    with pytest.raises(UsageError, match="a model wrote"):
        class_quality(model, model, replace(labelled(), generated=True), seed=0)
