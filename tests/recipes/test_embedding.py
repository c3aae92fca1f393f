"""Students of an embedder that are narrower than it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketsize as ps
from pocketsize.exporting import table
from pocketsize.io.checkpoint import open_checkpoint
from pocketsize.recipes.distill import Distill
from pocketsize.recipes.recipe import Data
from pocketsize.recipes.student import Student
from pocketsize.training import loop
from pocketsize.training.objective import Embedding
from quiet import Quiet
from tiny import HIDDEN, write_tiny

NARROW = Student(family="bert", hidden=HIDDEN // 2, layers=1, heads=2, ffn=HIDDEN)
LESSON: dict[str, Any] = {"tokens": 6000, "batch": 8, "length": 32, "rate": 3e-3}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "reload_check", lambda *_: ())


def run(tmp_path: Path, name: str, stop: int = 0, **options: Any) -> ps.Result:
    source = tmp_path / "m"
    if not source.exists():
        write_tiny(source, "mpnet")
        words = ("fox", "dog", "lazy", "sleeps", "weight", "grid", "error", "numbers", "pocket", "model")
        draw = random.Random(0)
        rows = [" ".join(draw.choices(words, k=8)) for _ in range(120)]
        (tmp_path / "t.txt").write_text("\n\n".join(rows))
    text = str(tmp_path / "t.txt")
    data = Data(train=(text,), calibrate=(text,), evaluate=(text,), sequences=4, length=32)
    steps = [NARROW, Distill(**(LESSON | options))]
    return ps.run(source, steps, out=tmp_path / name, data=data, dtype="fp32", console=Quiet(stop))


def test_a_narrow_student_is_compared_over_a_bridge_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Embedding] = []
    known = Embedding.loss
    monkeypatch.setattr(Embedding, "loss", lambda self, batch: (seen.append(self), known(self, batch))[1])
    done = run(tmp_path, "o")
    bridges = {id(one.bridge): one.bridge for one in seen}
    assert len(bridges) == 1
    (W,) = bridges.values()
    assert W is not None and W.shape == (HIDDEN, HIDDEN // 2)
    assert torch.allclose(W.T @ W, torch.eye(HIDDEN // 2), atol=1e-5)
    (report,) = [one.training for one in done.record.steps if one.training]
    first, last = report.losses[0][1], report.losses[-1][1]
    assert last < 0.7 * first


def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "EVERY_S", 0.0)
    monkeypatch.setattr(loop, "SHARE", 1e9)
    whole = run(tmp_path, "whole").folder
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "o", stop=20)
    again = run(tmp_path, "o").folder
    first, second = (open_checkpoint(folder) for folder in (whole, again))
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.entries)
