"""Corpora: the default one, its split, hashes and overlap."""

from __future__ import annotations

import random

import pytest

from oracles.shingles import overlap_slow
from pocketsize.data.text import Corpus, Document, default_corpora, overlap, read_corpus, require_evaluable
from pocketsize.errors import DataError, UsageError


def corpus(*texts: str, generated: bool = False) -> Corpus:
    return Corpus("test", tuple(Document(str(i), text) for i, text in enumerate(texts)), generated)


@pytest.fixture(scope="module")
def standard() -> tuple[Corpus, Corpus]:
    return default_corpora()


def test_default_corpora_are_large_enough_and_share_nothing(standard):
    calibrate, evaluate = standard
    sizes = [sum(len(d.text) for d in side.documents) for side in (calibrate, evaluate)]
    assert sizes[0] > 360_000 and sizes[1] > 160_000
    assert 0.3 < sizes[1] / sum(sizes) < 0.37
    assert not {d.name for d in calibrate.documents} & {d.name for d in evaluate.documents}
    assert overlap(calibrate, evaluate) < 0.005


def test_default_corpora_are_the_same_every_time(standard):
    assert [c.sha256 for c in default_corpora.__wrapped__()] == [c.sha256 for c in standard]


def test_overlap_equals_its_oracle():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(3)]
    texts = [
        " ".join(rng.choice(words) for _ in range(rng.choice([0, 5, 12, 13, 14, 400]))) for _ in range(40)
    ]
    first, second = [*texts[:20], "some text"], [*texts[20:], "some text", "Some, TEXT!", "other text"]
    assert overlap(corpus(*first), corpus(*second)) == pytest.approx(overlap_slow(first, second), abs=1e-12)


def test_overlap_of_a_text_with_itself_is_whole_and_with_another_none():
    text = " ".join(f"word{i}" for i in range(100))
    other = " ".join(f"thing{i}" for i in range(100))
    assert overlap(corpus(text), corpus(text)) == 1.0
    assert overlap(corpus(text), corpus(other)) == 0.0
    assert overlap(corpus(text), corpus(text, other)) == 0.5


def test_the_hash_pins_texts_and_order_but_not_names():
    assert corpus("a", "b").sha256 == Corpus("x", (Document("p", "a"), Document("q", "b"))).sha256
    assert (
        len({corpus("a", "b").sha256, corpus("b", "a").sha256, corpus("ab").sha256, corpus("a", "b ").sha256})
        == 4
    )


def test_a_corpus_of_nothing_is_refused():
    with pytest.raises(DataError, match="no text"):
        corpus(" \n")


def test_generated_text_never_evaluates(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two", "generated": true}\n')
    (tmp_path / "story.generated.txt").write_text("once")
    (tmp_path / "plain.txt").write_text("once")
    for name in ("rows.jsonl", "story.generated.txt", "*.txt"):
        with pytest.raises(UsageError, match="never evaluate"):
            require_evaluable(read_corpus([name], tmp_path))
    require_evaluable(read_corpus(["plain.txt"], tmp_path))
