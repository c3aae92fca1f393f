from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from pocketsize.data import written
from pocketsize.data.written import write_windows
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from tiny import GENERATORS, write_tiny


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load(write_tiny(tmp_path / "m", "llama"))


def test_a_seed_gives_the_same_windows_and_another_seed_others(model: Model) -> None:
    module, tokenizer = materialise(model), tokenizer_of(model)
    one, same, other = (write_windows(module, tokenizer, count=5, length=16, seed=seed) for seed in (0, 0, 1))
    assert one.shape == (5, 16) and one.dtype == torch.int64
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len({tuple(row) for row in one.tolist()}) == 5


def test_batches_do_not_change_how_many_windows_there_are(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "BATCH", 2)
    found = write_windows(materialise(model), tokenizer_of(model), count=5, length=8, seed=0)
    assert found.shape == (5, 8)


def test_tokens_come_as_often_as_the_model_says() -> None:
    """Among the likeliest, by their probability: 20,000 draws against the exact distribution."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -30.0]]).repeat(20_000, 1)
    drawn = written._sampled(logits, torch.Generator().manual_seed(0))
    counts = Counter(drawn[:, 0].tolist())
    for token, p in enumerate(logits[0].softmax(dim=0).tolist()):
        assert counts[token] / 20_000 == pytest.approx(p, abs=0.012)


def test_each_position_is_sampled_from_the_model_given_what_was_written(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the likeliest token alone to choose from, the windows are the greedy continuations."""
    monkeypatch.setattr(written, "LIKELIEST", 1)
    module = materialise(model)
    found = write_windows(module, tokenizer_of(model), count=2, length=6, seed=3)
    for end in range(1, 6):
        with torch.no_grad():
            expected = module(input_ids=found[:, :end]).logits[:, -1].argmax(dim=-1)
        assert torch.equal(found[:, end], expected)


def test_windows_begin_with_words(model: Model) -> None:
    assert written._begins_a_word(" Water") and written._begins_a_word("The")
    assert not any(map(written._begins_a_word, ("ab", "water", "WATER", " 1st", "", "<s>")))
    tokenizer = tokenizer_of(model)
    assert not set(written._word_starts(tokenizer)) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("family", GENERATORS)
def test_room_for_keys_and_values_changes_nothing(family: str, tmp_path: Path) -> None:
    """The tokens are those with the cache of transformers, in families that look back a few tokens too."""
    module = materialise(load(write_tiny(tmp_path / "m", family)))
    ids, past = torch.arange(20, 26).view(3, 2), None
    expected, generator = [ids], torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(30):
            out = module(input_ids=expected[-1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            expected.append(written._sampled(out.logits[:, -1], generator))
    found = written.continued(module, ids, 32, torch.Generator().manual_seed(1))
    assert torch.equal(found, torch.cat(expected, dim=1))
