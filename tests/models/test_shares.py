"""Sizes that a share leaves: near the share, even, and such as stock transformers has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketsize.errors import UsageError
from pocketsize.models.load import load
from pocketsize.models.shares import block_parameters, sizes_without
from pocketsize.models.surgery import sizes_of
from tiny import write_tiny

SHARES = (0.1, 0.25, 0.4, 0.5, 0.6)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "mpnet", "phi3", "gpt2", "gpt_neox", "mixtral"])
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


def test_more_goes_for_a_larger_share(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    left = [block_parameters(model, sizes_without(model, share)) for share in SHARES]
    assert left == sorted(left, reverse=True)


def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    with pytest.raises(UsageError, match=r"remove: 0.999 of the blocks leaves no channel"):
        sizes_without(model, 0.999)
