"""Parts left out, measured in one pass: what the models without them say, one by one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oracles.heal import distances_slow
from pocketsize.models import batches, calls, left_out
from pocketsize.models.left_out import (
    Part,
    distances_without,
    head_losses,
    head_work,
    least_missed,
    pick_work,
)
from pocketsize.models.load import load
from pocketsize.models.surgery import Sizes
from tiny import VOCAB, write_tiny


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (left_out, calls):
        monkeypatch.setattr(module, "forward_dtype", lambda: torch.float32)
    monkeypatch.setattr(batches, "BATCH_TOKENS", 48)


def tokens(*, padded: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, VOCAB - 1, (4, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[1::2, 17:] = False
    return ids, mask


READERS = {"llama": "self_attn.o_proj", "gpt2": None, "bert": "attention.output.dense", "mpnet": None}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", READERS)
def test_equals_models_without_them_one_by_one(
    family: str, padded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    ids, mask = tokens(padded=padded)
    parts = [Part(0), Part(1)]
    if reader := READERS[family]:
        parts += [Part(0, reader, (16, 32)), Part(1, reader, (0, 16))]
    wanted = distances_slow(model, ids, mask, parts)
    torch.testing.assert_close(distances_without(model, ids, mask, parts), wanted, rtol=1e-3, atol=1e-6)
    monkeypatch.setattr(left_out, "STATES", 1)  # one model at a time
    torch.testing.assert_close(distances_without(model, ids, mask, parts), wanted, rtol=1e-3, atol=1e-6)


def test_what_is_gone_already_is_gone_for_all(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    parts = [Part(1), Part(1, "self_attn.o_proj", (0, 16))]
    wanted = distances_slow(model, *tokens(), parts, gone={0})
    torch.testing.assert_close(
        distances_without(model, *tokens(), parts, gone={0}), wanted, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("family", ["bert", "mpnet", "roberta", "distilbert"])
def test_a_classifier_is_measured_by_its_classes(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", family, classes=("a", "b", "c")))
    parts = [Part(0), Part(1)]
    wanted = distances_slow(model, *tokens(padded=True), parts)
    torch.testing.assert_close(
        distances_without(model, *tokens(padded=True), parts), wanted, rtol=1e-3, atol=1e-6
    )


def test_the_block_that_is_missed_least_goes_first(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    kept, alone = least_missed(model, *tokens(), keep=1)
    assert kept == [int(torch.tensor(alone).argmax())] and len(alone) == 2


def test_heads_of_a_group_share_what_the_group_costs(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    ids, mask = tokens()
    found = head_losses(model, ids, mask, Sizes(2, 1, 128, 64, VOCAB))
    name = "model.layers.1.self_attn.o_proj"
    each = found[name].value()
    torch.testing.assert_close(each[0], each[1])
    (both,) = distances_without(model, ids, mask, [Part(1, "self_attn.o_proj", (0, 2 * model.head_width))])
    assert float(each[:2].sum()) == pytest.approx(both, rel=1e-4)
    assert head_losses(model, ids, mask, Sizes(4, 2, 64, 64, VOCAB)) == {}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often blocks were passed and the head was asked, in windows."""
    found: Counter[str] = Counter()
    run, said = left_out.run_block, left_out._Pass._said

    def counted(block: nn.Module, call: calls.Call) -> torch.Tensor:
        found["blocks"] += len(call.hidden)
        return run(block, call)

    def asked(self: Any, *given: Any) -> torch.Tensor:
        found["heads"] += 1
        return said(self, *given)

    monkeypatch.setattr(left_out, "run_block", counted)
    monkeypatch.setattr(left_out._Pass, "_said", asked)
    return found


def test_the_work_of_a_first_round_is_what_is_passed(tmp_path: Path, passes: Counter[str]) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", blocks=5))
    least_missed(model, *tokens(), keep=4)
    head = left_out._head(model)
    assert pick_work(model, 5, 4) == passes["blocks"] / 4 + head * passes["heads"] / 4
    assert head == VOCAB * 64 / (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_work_of_later_rounds_is_about_what_is_passed(
    keep: int, tmp_path: Path, passes: Counter[str]
) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", blocks=6))
    least_missed(model, *tokens(), keep=keep)
    found = passes["blocks"] / 4 + left_out._head(model) * passes["heads"] / 4
    assert pick_work(model, 6, keep) == pytest.approx(found, rel=0.3)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (2, 2), (4, 2)])
def test_the_work_of_heads_is_what_is_passed(
    heads: int, kv_heads: int, tmp_path: Path, passes: Counter[str]
) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", blocks=3))
    sizes = Sizes(heads, kv_heads, 128, 64, VOCAB)
    if head_losses(model, *tokens(), sizes):
        found = passes["blocks"] / 4 + left_out._head(model) * passes["heads"] / 4
        assert head_work(model, sizes, 3) == pytest.approx(found)
