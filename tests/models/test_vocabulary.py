"""Trimmed vocabularies: text that used only kept tokens is cut as before, other text is still spelled."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from oracles.slices import bpe_slow
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.models.vocabulary import (
    Speller,
    Vocabulary,
    derivation,
    kept_tokens,
    read_vocabulary,
    renumbered_config,
    trimmed,
)
from tiny import TEXT, write_tiny

USED = TEXT[0]
OTHER = TEXT[1]


@pytest.fixture(params=["llama", "bert"])
def vocabulary(request: pytest.FixtureRequest, tmp_path: Path) -> Vocabulary:
    write_tiny(tmp_path / "m", request.param)
    return read_vocabulary((tmp_path / "m" / "tokenizer.json").read_bytes())


def tokenizer(raw: object) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(raw))


def test_kept_text_is_cut_as_before(vocabulary: Vocabulary) -> None:
    large = tokenizer(vocabulary.raw)
    kept = kept_tokens(vocabulary, Counter(large.encode(USED).ids))
    assert len(kept) < len(vocabulary.numbers)
    small = tokenizer(trimmed(vocabulary, kept))
    assert small.encode(USED).tokens == large.encode(USED).tokens
    assert [kept[i] for i in small.encode(USED).ids] == large.encode(USED).ids
    assert small.get_vocab_size() == len(kept)
    assert sorted(small.get_vocab().values()) == list(range(len(kept)))


def test_other_text_is_spelled_with_what_is_left(vocabulary: Vocabulary) -> None:
    large = tokenizer(vocabulary.raw)
    kept = kept_tokens(vocabulary, Counter(large.encode(USED).ids))
    raw = trimmed(vocabulary, kept)
    small = tokenizer(raw)
    assert small.decode(small.encode(OTHER).ids) == large.decode(large.encode(OTHER).ids)
    speller = Speller(vocabulary, Vocabulary(raw))
    ids = torch.tensor([large.encode(OTHER).ids])
    new, real = speller.respelled(ids, torch.ones_like(ids, dtype=torch.bool))
    assert bool(real.all())
    wide = speller.table(ids.flatten().tolist())
    spelled = [part for i in large.encode(OTHER).ids for part in wide[i]]
    assert small.decode(spelled) == large.decode(large.encode(OTHER).ids)
    assert new[0].tolist() == spelled[: ids.shape[1]]


def test_exactly_so_many_are_kept(vocabulary: Vocabulary) -> None:
    least = len(kept_tokens(vocabulary, {}))
    counts = Counter(tokenizer(vocabulary.raw).encode(USED).ids)
    for limit in (least, least + 3, len(vocabulary.numbers)):
        assert len(kept_tokens(vocabulary, counts, limit)) == limit
    with pytest.raises(UsageError, match=f"{least - 1} is too few.* {least}"):
        kept_tokens(vocabulary, counts, least - 1)


def test_merging_is_that_of_the_slow_way(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m", "llama")
    vocabulary = read_vocabulary((tmp_path / "m" / "tokenizer.json").read_bytes())
    ranks = {pair: i for i, pair in enumerate(vocabulary.merges)}
    words = [token for token in vocabulary.own if len(token) > 1] + ["abcab", "lazydog", "Ġthequick"]
    for word in words:
        parts, seen = derivation(word, ranks)
        assert parts == bpe_slow(word, vocabulary.merges)
        assert {*parts, *word} <= seen


def test_special_tokens_and_bytes_stay(vocabulary: Vocabulary) -> None:
    kept = kept_tokens(vocabulary, {})
    assert set(vocabulary.added.values()) <= set(kept)
    if vocabulary.kind == "BPE":
        alphabet = [number for token, number in vocabulary.own.items() if len(token) == 1]
        assert set(alphabet) <= set(kept)


def test_frames_get_the_new_numbers(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m", "bert")
    vocabulary = read_vocabulary((tmp_path / "m" / "tokenizer.json").read_bytes())
    large = tokenizer(vocabulary.raw)
    kept = kept_tokens(vocabulary, Counter(large.encode(USED).ids))
    small = tokenizer(trimmed(vocabulary, kept))
    assert [kept[i] for i in small.encode(USED).ids] == large.encode(USED).ids
    assert small.encode(USED).ids[0] != large.encode("the").ids[1]


def test_configs_get_the_new_numbers() -> None:
    raw = {"bos_token_id": 5, "eos_token_id": [5, 9], "pad_token_id": None, "hidden_size": 5}
    assert renumbered_config(raw, {5: 1}) == raw | {"bos_token_id": 1, "eos_token_id": [1]}


def test_unigram_keeps_its_unknown_and_scores() -> None:
    pieces = [["<unk>", 0.0], ["a", -1.0], ["b", -2.0], ["ab", -1.5], ["zz", -3.0]]
    raw = {"model": {"type": "Unigram", "unk_id": 0, "vocab": pieces}, "added_tokens": []}
    vocabulary = Vocabulary(raw)
    kept = kept_tokens(vocabulary, {3: 4})
    assert kept == [0, 1, 2, 3]
    assert trimmed(vocabulary, kept)["model"] == {"type": "Unigram", "unk_id": 0, "vocab": pieces[:4]}


def test_other_kinds_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="'WordLevel' cannot be trimmed"):
        Vocabulary({"model": {"type": "WordLevel", "vocab": {}}})
