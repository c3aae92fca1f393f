"""Rotated models compute what they did; what cannot be turned is refused."""

from __future__ import annotations

import pytest
import torch

from pocketsize.errors import UnsupportedError
from pocketsize.models.load import load
from pocketsize.models.rotated import RESIDUAL, rotated
from pocketsize.models.skeleton import materialise
from tiny import GENERATORS, write_tiny

IDS = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(0))
FUSED = ("phi3", "gpt2", "gpt_neox")


@pytest.mark.parametrize("family", [f for f in GENERATORS if f not in FUSED])
def test_turned_values_change_no_logits(family: str, tmp_path) -> None:
    model = load(write_tiny(tmp_path, family))
    turned = rotated(model)
    name = next(n for n in model.linears if "v_proj" in n)
    assert not torch.allclose(turned.original(name), model.original(name), atol=1e-2)
    assert turned.tied == model.tied
    assert torch.allclose(*(materialise(m)(IDS).logits for m in (model, turned)), atol=2e-4)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "mpnet"])
def test_turned_values_change_no_embeddings(family: str, tmp_path) -> None:
    model = load(write_tiny(tmp_path, family))
    turned = rotated(model)
    assert len(turned.checkpoint.packed) == 6  # values with their biases, and what reads them, of two blocks
    assert torch.allclose(*(materialise(m)(IDS).last_hidden_state for m in (model, turned)), atol=2e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", RESIDUAL)
def test_a_turned_residual_stream_changes_no_logits(family: str, tied: bool, tmp_path) -> None:
    model = load(write_tiny(tmp_path, family, tied=tied))
    turned = rotated(model, values=family not in FUSED, residual=True, seed=3)
    assert not turned.tied and model.config.tie_word_embeddings is tied
    norm = turned.original(f"{turned.blocks[0]}.input_layernorm.weight")
    assert torch.equal(norm, torch.ones_like(norm))
    assert torch.allclose(*(materialise(m)(IDS).logits for m in (model, turned)), atol=2e-4)


def test_what_cannot_be_turned_is_refused(tmp_path) -> None:
    for family in FUSED:
        with pytest.raises(UnsupportedError, match="no matrix of values"):
            rotated(load(write_tiny(tmp_path / family, family)))
    classifier = load(write_tiny(tmp_path / "classes", "llama", classes=("a", "b")))
    with pytest.raises(UnsupportedError, match="without a head for tokens cannot be turned"):
        rotated(classifier, residual=True)
    for family in ("gemma2", "mixtral", "opt"):
        with pytest.raises(UnsupportedError, match="cannot be turned; known for llama"):
            rotated(load(write_tiny(tmp_path / family, family)), residual=True)
