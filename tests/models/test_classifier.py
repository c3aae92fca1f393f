"""Models with a head for classes: every family loads, computes what stock transformers does, and walks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from pocketsize.errors import DataError
from pocketsize.models.arch import arch_of, classifying
from pocketsize.models.ledger import ledger
from pocketsize.models.load import load
from pocketsize.models.skeleton import materialise
from pocketsize.models.walk import walk
from tiny import ENCODERS, FAMILIES, write_tiny, write_weights

CLASSES = ("a", "b", "c")


@pytest.mark.parametrize("family", [*FAMILIES, "squeezebert"])
def test_every_family_computes_what_stock_transformers_does(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path, family, classes=CLASSES))
    assert model.arch.task == "classify" and model.arch.head is None and model.arch.gguf is None
    assert model.arch.embedding in model.checkpoint.entries
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.randint(5, 300, (1, 12))
    with torch.no_grad():
        found, wanted = materialise(model)(input_ids=ids).logits, stock(input_ids=ids).logits
    # Grouped convolutions are products here, and where a matrix lies in memory may change its last digit.
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 if family == "squeezebert" else 1e-6)
    assert {row.name for row in ledger(model).rows if row.role == "compressible"} == set(model.linears)


@pytest.mark.parametrize("family", [*ENCODERS, "llama", "gpt2"])
def test_the_walk_visits_the_linears_of_the_blocks(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path, family, classes=CLASSES))
    ids = torch.randint(5, 300, (4, 16))
    assert [n for site in walk(model, ids, ids > 0) for n in site.names] == model.linears


def rewritten(folder: Path, **changes: Any) -> Path:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"problem_type": "regression"},
        {"problem_type": "multi_label_classification"},
        {"id2label": {"0": "x"}},
    ],
)
def test_heads_that_choose_no_class_are_left_beside_the_encoder(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = load(rewritten(write_tiny(tmp_path, "bert", classes=CLASSES), **changes, label2id={}))
    assert model.arch.task == "embed" and "classifier.weight" in model.checkpoint.entries


def test_a_head_that_is_missing_or_of_other_classes_is_refused(tmp_path: Path) -> None:
    tensors = load_file(write_tiny(tmp_path, "bert", classes=CLASSES) / "model.safetensors")
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        write_weights(tmp_path, {n: t for n, t in tensors.items() if n != name})
        with pytest.raises(DataError, match=f"tensor {name} missing"):
            load(tmp_path)
    write_weights(tmp_path, tensors | {"classifier.weight": tensors["classifier.weight"][:2].clone()})
    with pytest.raises(DataError, match=r"classifier.weight has shape \[2, 64\]"):
        load(tmp_path)


def test_a_pooler_that_the_class_does_not_use_may_be_there(tmp_path: Path) -> None:
    write_tiny(tmp_path, "roberta", classes=CLASSES)
    tensors = load_file(tmp_path / "model.safetensors")
    write_weights(tmp_path, tensors | {"roberta.pooler.dense.weight": torch.zeros(64, 64)})
    assert "roberta.pooler.dense.weight" in load(tmp_path).checkpoint.entries


def test_old_names_of_norms_are_known_below_the_prefix() -> None:
    arch = classifying(arch_of("bert"))
    assert arch.module_name("bert.embeddings.LayerNorm.gamma") == "bert.embeddings.LayerNorm.weight"
    assert arch_of("bert").module_name("bert.embeddings.LayerNorm.gamma") == "embeddings.LayerNorm.weight"
