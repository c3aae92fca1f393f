"""Parts left out, measured in one pass: what the models without them say, one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oracles.heal import distances_slow
from pocketsize.models import calls, left_out
from pocketsize.models.left_out import Part, distances_without, head_losses, least_missed
from pocketsize.models.load import load
from pocketsize.models.surgery import Sizes
from tiny import VOCAB, write_tiny


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (left_out, calls):
        monkeypatch.setattr(module, "forward_dtype", lambda: torch.float32)
    monkeypatch.setattr(calls, "BATCH_TOKENS", 48)


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


def test_a_classifier_is_measured_by_its_classes(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "bert", classes=("a", "b", "c")))
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
