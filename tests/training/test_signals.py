"""What teachers said, kept on disk: as good as hearing them, resumed, and refused to others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pocketsize.distillation.divergence import Divergence, divergence
from pocketsize.distillation.signal import signal_divergence
from pocketsize.errors import BusyError, IntegrityError
from pocketsize.io.lock import lock_file
from pocketsize.training import signals as kept_signals
from pocketsize.training.examples import Batch, Examples, of_rows
from pocketsize.training.signals import LOCK, PARTS, Signals, open_signals

WORDS = 40


def examples(rows: int = 6) -> Examples:
    draw = np.random.default_rng(0)
    return of_rows([draw.integers(0, WORDS, 5 + i) for i in range(rows)], 0, "numbers")


def teacher(vocabulary: int = WORDS, seed: int = 0) -> Tensor:
    """Logits of the next token by the token before it."""
    return torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def says(table: Tensor) -> Callable[[Batch, Tensor], Callable[[slice], Tensor]]:
    return lambda batch, kept: lambda part: table[batch.ids[kept] % len(table)][part]


def facts(kind: str = "top_k", kept: int = 8, **others: str) -> dict[str, str]:
    return {"teacher 1 weights": "a", "signals": kind, "kept": str(kept), "seed": "0"} | others


def heard(folder: Path, table: Tensor, kind: str = "top_k", kept: int = 8) -> Signals:
    found = open_signals(folder, facts(kind, kept), len(table))
    found.hear(range(6), examples(), says(table), lambda *_: None)
    return found


def predicted(batch: Batch) -> Tensor:
    kept = batch.mask & batch.mask.roll(-1, 1)
    kept[:, -1] = False
    return kept


def test_all_tokens_of_the_vocabulary_are_the_dense_loss(tmp_path: Path) -> None:
    table, student = teacher(), teacher(seed=1)
    batch = examples().batch([3, 0, 5])
    kept = predicted(batch)
    signal = heard(tmp_path / "s", table, kept=WORDS)(batch, kept)
    found, slope = signal_divergence(student[batch.ids[kept]], signal)
    dense, of_dense = divergence(student[batch.ids[kept]], table[batch.ids[kept]], Divergence())
    assert torch.allclose(found, dense, atol=3e-3) and torch.allclose(slope, of_dense, atol=1e-3)


def test_draws_are_unbiased(tmp_path: Path) -> None:
    """The mean slope over many draws is the dense one, which that of the likeliest tokens is not."""
    table, student = teacher(), teacher(seed=1)
    batch = examples().batch([4])
    kept = predicted(batch)
    x = student[batch.ids[kept]]
    _, dense = divergence(x, table[batch.ids[kept]], Divergence())
    slope = signal_divergence(x, heard(tmp_path / "s", table, "sampled", 20_000)(batch, kept))[1]
    assert float((slope - dense).abs().max()) < 0.02
    few = signal_divergence(x, heard(tmp_path / "k", table, "top_k", 4)(batch, kept))[1]
    assert float((few - dense).abs().max()) > 0.02


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_nothing_is_lost_where_both_agree(kind: str, tmp_path: Path) -> None:
    table = teacher()
    batch = examples().batch([0, 1, 2])
    kept = predicted(batch)
    loss, _ = signal_divergence(table[batch.ids[kept]], heard(tmp_path / "s", table, kind)(batch, kept))
    assert float(loss.abs().max()) < 3e-3


def test_numbers_take_two_bytes_up_to_65536_tokens(tmp_path: Path) -> None:
    batch, table = examples().batch([2]), torch.zeros(1, 60_000)
    table[0, 50_000:50_008] = 9.0
    found = open_signals(tmp_path / "s", facts(kept=8), 60_000)
    found.hear([2], examples(), says(table), lambda *_: None)
    assert sorted(found(batch, predicted(batch)).ids[0].tolist()) == list(range(50_000, 50_008))
    (part,) = (tmp_path / "s" / PARTS).iterdir()
    positions = int(predicted(batch).sum())
    assert part.stat().st_size < 1000 + positions * (8 * 4 + 4)


def test_a_broken_off_hearing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_signals, "PART", 10)
    table, asked = teacher(), list[int]()

    def cut_off(batch: Batch, kept: Tensor) -> Callable[[slice], Tensor]:
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(batch.rows[0])
        return says(table)(batch, kept)

    first = open_signals(tmp_path / "s", facts(), WORDS)
    with pytest.raises(KeyboardInterrupt):
        first.hear(range(6), examples(), cut_off, lambda *_: None)
    again = open_signals(tmp_path / "s", facts(), WORDS)
    assert again.missing(range(6)) == [4, 5]
    again.hear(range(6), examples(), says(table), lambda *_: None)
    batch = examples().batch(range(6))
    whole = heard(tmp_path / "w", table)(batch, predicted(batch))
    same = open_signals(tmp_path / "s", facts(), WORDS)(batch, predicted(batch))
    assert torch.equal(same.ids, whole.ids) and torch.equal(same.log_p, whole.log_p)


def test_a_damaged_part_is_heard_again(tmp_path: Path) -> None:
    table = teacher()
    heard(tmp_path / "s", table)
    (part,) = (tmp_path / "s" / PARTS).iterdir()
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    found = open_signals(tmp_path / "s", facts(), WORDS)
    assert found.missing(range(6)) == [0, 1, 2, 3, 4, 5]
    found.hear(range(6), examples(), says(table), lambda *_: None)
    assert not open_signals(tmp_path / "s", facts(), WORDS).missing(range(6))


def test_a_folder_of_another_teacher_is_refused_by_name(tmp_path: Path) -> None:
    heard(tmp_path / "s", teacher())
    with pytest.raises(IntegrityError, match="teacher 1 weights was 'a' and is now 'b'"):
        open_signals(tmp_path / "s", facts() | {"teacher 1 weights": "b"}, WORDS)
    with pytest.raises(IntegrityError, match="kept was '8' and is now '9'"):
        open_signals(tmp_path / "s", facts(kept=9), WORDS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(IntegrityError, match="holds other things"):
        open_signals(tmp_path / "mine", facts(), WORDS)


def test_one_process_at_a_time_hears(tmp_path: Path) -> None:
    found = open_signals(tmp_path / "s", facts(), WORDS)
    lock_file(tmp_path / "s" / LOCK)
    with pytest.raises(BusyError):
        found.hear(range(6), examples(), says(teacher()), lambda *_: None)


def test_parts_of_examples_keep_their_numbers(tmp_path: Path) -> None:
    table = teacher()
    found, own = heard(tmp_path / "s", table), examples().part([1, 4, 5]).part([1, 2]).batch([1])
    whole = examples().batch([5])
    assert own.rows == (5,) and torch.equal(own.ids, whole.ids)
    assert torch.equal(found(own, predicted(own)).ids, found(whole, predicted(whole)).ids)
