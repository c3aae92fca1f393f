"""Sizes that a share leaves: near the share, even, and such as stock transformers has them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pocketsize.errors import UsageError
from pocketsize.models.load import load
from pocketsize.models.shares import block_parameters, sizes_without
from pocketsize.models.surgery import outlined, sizes_of
from tiny import write_tiny

SHARES = (0.1, 0.25, 0.4, 0.5, 0.6)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "bert", "mpnet", "phi3", "gpt2", "opt", "gpt_neox", "mixtral"]
)
def test_about_the_share_goes(family: str, share: float, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    own, sizes = sizes_of(model), sizes_without(model, share)
    gone = 1 - block_parameters(model, sizes) / block_parameters(model, own)
    assert gone == pytest.approx(share, abs=0.011)
    assert sizes.heads % sizes.kv_heads == 0 and sizes.heads // sizes.kv_heads == own.heads // own.kv_heads
    assert sizes.vocabulary == own.vocabulary
    if model.arch.cuts is not None and not model.arch.cuts.square:
        assert sizes.hidden == own.hidden
    if share == 0.1:
        assert sizes.heads == own.heads and sizes.ffn < own.ffn and sizes.ffn % 2 == 0


@pytest.mark.parametrize("family", ["opt", "electra"])
def test_no_width_is_chosen_that_the_class_has_no_place_for(family: str, tmp_path: Path) -> None:
    """Tiny ones have embeddings of 32: there is nothing that leads from as many channels to as many."""
    model = load(write_tiny(tmp_path / "m", family))
    for share in (0.5, 0.6, 0.7):
        assert sizes_without(model, share).hidden != 32


def test_heads_stay_where_positions_are_scaled_for_them(tmp_path: Path) -> None:
    """Phi-3 with longrope has as many factors as its width and heads say."""
    folder = write_tiny(tmp_path / "m", "phi3")
    raw = json.loads((folder / "config.json").read_text())
    factors = {name: [1.0] * 8 for name in ("short_factor", "long_factor")}
    raw["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 1.0} | factors
    raw["original_max_position_embeddings"] = 256
    (folder / "config.json").write_text(json.dumps(raw))
    model = load(folder)
    sizes = sizes_without(model, 0.5)
    assert sizes.heads == 4 and sizes.ffn < 64
    with pytest.raises(UsageError, match="length 16, got 8; ffn alone, or hidden and heads in proportion"):
        outlined(model, replace(sizes, heads=2, kv_heads=1))
    assert outlined(model, replace(sizes, heads=2, kv_heads=1, hidden=32)).config.hidden_size == 32


def test_more_goes_for_a_larger_share(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    left = [block_parameters(model, sizes_without(model, share)) for share in SHARES]
    assert left == sorted(left, reverse=True)


def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    with pytest.raises(UsageError, match=r"remove: 0.999 of the blocks leaves no channel"):
        sizes_without(model, 0.999)
