from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pocketsize.data.text import Corpus, Document
from pocketsize.errors import DataError, UsageError
from pocketsize.models.load import load, tokenizer_of
from pocketsize.training.examples import Examples, Order, of_rows
from pocketsize.training.texts import examples_of, packed, separate
from tiny import TEXT, write_tiny


def rows(lengths: list[int], labels: np.ndarray | None = None) -> Examples:
    return of_rows([np.arange(n) + 10 * i for i, n in enumerate(lengths)], 99, "numbers", labels)


def test_every_row_comes_once_an_epoch_and_any_batch_can_be_asked_for() -> None:
    order = Order(rows([3, 9, 1, 4, 4, 8, 2]), 3, seed=5)
    assert order.per_epoch == 3
    for epoch in range(3):
        numbers = [order.batch(3 * epoch + i).rows for i in range(3)]
        assert sorted(n for some in numbers for n in some) == list(range(7))
    again = Order(rows([3, 9, 1, 4, 4, 8, 2]), 3, seed=5)
    assert again.batch(7).rows == order.batch(7).rows
    first = [order.batch(i).rows for i in range(3)]
    assert first != [order.batch(3 + i).rows for i in range(3)]
    assert first != [Order(order.examples, 3, seed=6).batch(i).rows for i in range(3)]


def test_a_batch_is_padded_at_its_end_and_near_lengths_are_together() -> None:
    batch = rows([2, 4], np.array([1, 0])).batch([1, 0])
    assert batch.ids.tolist() == [[10, 11, 12, 13], [0, 1, 99, 99]] and batch.tokens == 6
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.labels is not None and batch.labels.tolist() == [0, 1]
    mixed = rows([4, 40] * 50)
    order = Order(mixed, 10, seed=0)
    padded = sum(order.batch(i).mask.numel() for i in range(order.per_epoch))
    assert padded == mixed.tokens  # no batch has both kinds


def test_a_hash_pins_tokens_rows_and_labels() -> None:
    one = rows([2, 3])
    assert one.sha256 == rows([2, 3]).sha256 and one.part([0, 1]).sha256 == one.sha256
    assert len({one.sha256, rows([3, 2]).sha256, rows([2, 3], np.array([0, 1])).sha256}) == 3


def test_packed_windows_hold_all_tokens_with_an_end_behind_each_document(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(load(write_tiny(tmp_path / "m", "llama")))
    corpus = Corpus("six", tuple(Document(str(i), text) for i, text in enumerate(TEXT)))
    found = packed(corpus, tokenizer, length=16)
    wanted = [t for text in TEXT for t in [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]]
    assert found.flat.tolist() == wanted[: len(found.flat)] and len(wanted) - len(found.flat) < 4
    assert set(found.lengths[:-1]) == {16} and found.pad == 2


def test_texts_of_an_encoder_are_framed_and_cut(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(load(write_tiny(tmp_path / "m", "bert")))
    corpus = Corpus("two", (Document("a", f"{TEXT[0]}\n\n{TEXT[1]}\n\n"), Document("b", "word " * 40)))
    found = separate(corpus, tokenizer, length=16)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    for row in range(len(found)):
        ids = found.flat[found.starts[row] : found.starts[row + 1]]
        assert ids[0] == cls and ids[-1] == sep and len(ids) <= 16 and cls not in ids[1:]


def test_both_texts_of_a_pair_teach_an_embedder_and_a_classifier_reads_them_as_one(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(load(write_tiny(tmp_path / "m", "bert")))
    alone = Document("b", TEXT[4])
    pairs = Corpus("pairs", (Document("a", TEXT[0], pair=TEXT[1]), alone))
    texts = Corpus("texts", (Document("a", TEXT[0]), Document("p", TEXT[1]), alone))
    of_pairs, of_texts = (examples_of(one, tokenizer, length=64, task="embed") for one in (pairs, texts))
    assert of_pairs.sha256 == of_texts.sha256 and len(of_pairs) == 3
    together = examples_of(pairs, tokenizer, length=64, task="classify")
    assert len(together) == 2
    assert together.flat[: together.starts[1]].tolist() == tokenizer(TEXT[0], TEXT[1])["input_ids"]


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(load(write_tiny(tmp_path / "m", "bert")))
    with pytest.raises(DataError, match="nothing to train on"):
        separate(Corpus("short", (Document("a", "a"),)), tokenizer, length=64)
    with pytest.raises(UsageError, match="no room for text"):
        separate(Corpus("x", (Document("a", TEXT[0]),)), tokenizer, length=4)
    with pytest.raises(UsageError, match="batch must be at least 1"):
        Order(rows([1]), 0, seed=0)
    assert torch.tensor(rows([1]).batch([0]).rows).tolist() == [0]
