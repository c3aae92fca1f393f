from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oracles.walk import gram_of, matrix_of, rows_of
from pocketsize.errors import NumericalError
from pocketsize.models import batches
from pocketsize.models import calls as calling
from pocketsize.models import walk as walking
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.walk import walk
from tiny import FAMILIES, VOCAB, write_tiny, write_weights


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact arithmetic on every machine; several batches even for little text."""
    for module in (calling, walking):
        monkeypatch.setattr(module, "forward_dtype", lambda: torch.float32)
    monkeypatch.setattr(batches, "BATCH_TOKENS", 48)


def tokens(model: Model, *, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, VOCAB - 1, (5, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        for row, length in enumerate((24, 11, 7, 20, 16)):
            mask[row, length:] = False
            ids[row, length:] = model.config.pad_token_id or 0
    return ids, mask


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_calibrated_on_the_model_as_changed_so_far(
    family: str, padded: bool, tmp_path: Path
) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    ids, mask = tokens(model, padded=padded)
    replaced: dict[str, torch.Tensor] = {}
    seen: list[str] = []
    attending: list[str] = []
    for site in walk(model, ids, mask):
        rows = rows_of(model, replaced, site.names[0], ids, mask)
        assert site.gram.tokens == len(rows)
        assert ".experts." in site.names[0] or len(rows) == int(mask.sum())
        assert torch.allclose(site.gram.mean(), rows.T @ rows / len(rows), atol=2e-4, rtol=1e-3)
        if site.first is not None:
            firsts = rows_of(model, replaced, site.names[0], ids, mask, first=True)
            assert site.first.tokens == len(firsts) == len(ids)
            assert torch.allclose(site.first.mean(), firsts.T @ firsts / len(ids), atol=2e-4, rtol=1e-3)
            attending.append(site.block)
        for name, weight in zip(site.names, site.weights, strict=True):
            assert torch.equal(weight, matrix_of(model, name))
            site.replaced[name] = replaced[name] = weight * 0.7
        seen += site.names
    assert seen == model.linears
    assert len(attending) == len(model.blocks)


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt"])
def test_every_fourth_window_is_held_out_and_counted_all_the_same(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    ids, mask = tokens(model, padded=True)
    plain = walk(model, ids, mask)
    for site, same in zip(walk(model, ids, mask, hold_out=True), plain, strict=True):
        assert site.held is not None and same.held is None
        assert site.gram.tokens == same.gram.tokens
        assert torch.allclose(site.gram.mean(), same.gram.mean(), atol=2e-4, rtol=1e-3)
        rows = rows_of(model, {}, site.names[0], ids[3:4], mask[3:4])
        assert site.held.tokens == len(rows)
        if len(rows):
            assert torch.allclose(site.held.mean(), rows.T @ rows / len(rows), atol=2e-4, rtol=1e-3)
            rest = site.gram.without(site.held)
            assert rest.tokens == site.gram.tokens - len(rows)


def test_blocks_that_return_tuples_may_be_many(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", "mpnet")
    raw = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 6}
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".layer.1." in name]:
        tensors |= {name.replace(".1.", f".{i}."): tensors[name] for i in range(2, 6)}
    write_weights(folder, tensors)
    model = load(folder)
    ids, mask = tokens(model, padded=True)
    last = list(walk(model, ids, mask))[-1]
    exact = gram_of(model, {}, "encoder.layer.5.output.dense.weight", ids, mask)
    assert last.names == ("encoder.layer.5.output.dense.weight",)
    assert torch.allclose(last.gram.mean(), exact, atol=2e-4, rtol=1e-3)


def test_finished_blocks_are_replayed_not_visited(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    ids, mask = tokens(model, padded=False)
    first: dict[str, torch.Tensor] = {}
    grams: dict[str, torch.Tensor] = {}
    for site in walk(model, ids, mask):
        for name, weight in zip(site.names, site.weights, strict=True):
            site.replaced[name] = weight * 0.9
            if site.block.endswith(".0"):
                first[name] = site.replaced[name]
        grams[site.names[0]] = site.gram.mean()
    again = list(walk(model, ids, mask, finished=lambda path: first if path.endswith(".0") else None))
    assert {site.block for site in again} == {"model.layers.1"}
    assert torch.equal(again[0].gram.mean(), grams[again[0].names[0]])


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_a_site_too(tied: bool, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", tied=tied))
    ids, mask = tokens(model, padded=False)
    site = list(walk(model, ids, mask, head=True))[-1]
    assert site.block == "head" and site.names == (model.arch.embedding if tied else "lm_head.weight",)
    assert torch.allclose(
        site.gram.mean(), gram_of(model, {}, "lm_head.weight", ids, mask), atol=2e-4, rtol=1e-3
    )


def test_the_walk_leaves_no_hook_and_no_thread_state(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "bert"))
    visits = walk(model, *tokens(model, padded=False))
    next(visits)
    visits.close()
    assert torch.is_grad_enabled()


def test_infinite_activations_name_the_block(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    ids, mask = tokens(model, padded=False)
    with pytest.raises(NumericalError, match=r"model\.layers\.0: NaN or infinity"):
        for site in walk(model, ids, mask):
            for name, weight in zip(site.names, site.weights, strict=True):
                site.replaced[name] = torch.full_like(weight, float("inf"))


def test_rotary_tables_stay_float32_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (calling, walking):
        monkeypatch.setattr(module, "forward_dtype", lambda: torch.bfloat16)
    model = load(write_tiny(tmp_path / "m", "llama"))
    ids, mask = tokens(model, padded=False)
    for site in walk(model, ids, mask):
        exact = gram_of(model, {}, site.names[0], ids, mask)
        assert float((site.gram.mean() - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("judged", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert"])
def test_sites_know_what_they_lack_beside_the_original(family: str, judged: bool, tmp_path: Path) -> None:
    """Of all batches, or of all but those that judge; the Gram matrix and what passes on are as without."""
    model = load(write_tiny(tmp_path / "m", family))
    ids = torch.randint(5, VOCAB - 1, (9, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    for row, length in enumerate((24, 11, 7, 20, 16)):
        mask[row, length:] = False
    judges = batches.batches_of(mask)[3::4]
    assert judges
    teach = [i for i in range(9) if not judged or not any(r.start <= i < r.stop for r, _ in judges)]
    replaced: dict[str, torch.Tensor] = {}
    plain = walk(model, ids, mask)
    for site, other in zip(walk(model, ids, mask, drift=True, judged=judged), plain, strict=True):
        assert torch.allclose(site.gram.mean(), other.gram.mean(), atol=2e-4, rtol=1e-3)
        assert other.drift is None and site.whole is None
        for found, first in ((site.drift, False), (site.first_drift, True)):
            if found is None:
                assert first and site.first is None
                continue
            y, x = (
                rows_of(model, changed, site.names[0], ids[teach], mask[teach], first=first)
                for changed in (replaced, {})
            )
            assert found.read.tokens == len(y) == len(x)
            assert torch.allclose(found.read.mean(), y.T @ y / len(y), atol=2e-4, rtol=1e-3)
            W = torch.cat(site.weights)
            assert found.outputs == (len(site.names) == 1 and len(W) < W.shape[1])
            assert torch.allclose(found.lost(W), W @ (x - y).T @ y / len(y), atol=2e-4, rtol=1e-3)
        for name, weight in zip(site.names, site.weights, strict=True):
            site.replaced[name] = other.replaced[name] = replaced[name] = weight * 0.7


def test_what_sites_lack_is_known_behind_finished_blocks_too(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    ids, mask = tokens(model, padded=False)
    first: dict[str, torch.Tensor] = {}
    drifts: dict[str, torch.Tensor] = {}
    for site in walk(model, ids, mask, drift=True):
        assert site.drift is not None
        drifts[site.names[0]] = site.drift.mean()
        for name, weight in zip(site.names, site.weights, strict=True):
            site.replaced[name] = weight * 0.9
            if site.block.endswith(".0"):
                first[name] = site.replaced[name]
        if site.whole is not None:
            site.replaced |= {n: model.matrix(n) * 0.9 for n in model.linears_of(site.block)}
    again = walk(model, ids, mask, drift=True, finished=lambda path: first if path.endswith(".0") else None)
    for site in again:
        assert site.drift is not None and torch.equal(site.drift.mean(), drifts[site.names[0]])
        site.replaced = {n: W * 0.9 for n, W in zip(site.names, site.weights, strict=True)}
