"""Recipe key `masking`: texts of encoders with tokens hidden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketsize as ps
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.exporting import table
from pocketsize.models.load import load, tokenizer_of
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.gradual import Gradual
from pocketsize.recipes.recipe import Data
from pocketsize.training.examples import Batch
from pocketsize.training.objective import Classes, Embedding
from tiny import write_tiny


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "reload_check", lambda *_: ())


def labelled(path: Path) -> str:
    rows = [{"text": f"the quick brown fox number {i}", "label": "ab"[i % 2]} for i in range(240)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


SHORT: dict[str, Any] = {"batch": 4, "length": 32, "masking": 0.5}
# Whose loss is asked, and the step whose key counts.
LESSONS = {
    "labels": (Classes, Finetune(epochs=1.0, **SHORT)),
    "teacher": (Classes, Distill(epochs=1.0, **SHORT)),
    "labels, pruned": (Classes, Gradual(epochs=1.0, sparsity=0.5, soft=0.0, hard=1.0, **SHORT)),
    "embedder": (Embedding, Distill(tokens=2000, **SHORT)),
}


@pytest.mark.parametrize("name", LESSONS)
def test_texts_are_read_with_tokens_hidden(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, step = LESSONS[name]
    seen: list[Batch] = []
    known = kind.loss
    monkeypatch.setattr(kind, "loss", lambda self, batch: (seen.append(batch), known(self, batch))[1])
    source = write_tiny(tmp_path / "m", "mpnet")
    head: list[Any] = [Finetune(epochs=1.0, batch=4, length=32)] if kind is Classes else []
    head = [] if isinstance(step, Finetune) else head
    data = Data(train=(labelled(tmp_path / "t.jsonl"),), sequences=4, length=32)
    ps.run(source, [*head, step], out=tmp_path / "o", data=data, dtype="fp32")
    mask = tokenizer_of(load(source)).mask_token_id
    assert isinstance(mask, int)
    own = seen[len(seen) // 2 :] if head else seen  # both trainings have as many batches
    hidden = torch.cat([batch.ids[batch.mask] for batch in own]).eq(mask).float().mean()
    assert 0.3 < float(hidden) < 0.55  # half of what does not frame the texts


@pytest.mark.parametrize("step", [Finetune, Distill])
def test_a_share_that_is_none_is_refused(step: type[Any]) -> None:
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UsageError, match="masking is a share from 0 to below 1"):
            step(masking=share)


@pytest.mark.parametrize("step", [Finetune, Distill])
def test_models_without_a_mask_are_refused_before_work(step: type[Any], tmp_path: Path) -> None:
    generator, encoder = load(write_tiny(tmp_path / "g", "llama")), write_tiny(tmp_path / "e", "bert")
    with pytest.raises(UnsupportedError, match="masking: llama predicts each token from the ones before"):
        step(masking=0.1).resolve(generator, ("folder",))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := encoder / name).exists():
            path.write_text(
                json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "mask_token"})
            )
    with pytest.raises(UnsupportedError, match=r"masking: the tokenizer of .* has no mask token"):
        step(masking=0.1).resolve(load(encoder), ("folder",))
