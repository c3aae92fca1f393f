"""How many weights each linear loses, where the best of all together is searched."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.oracles.pruning import error, refit_slow
from torch import Tensor

from pocketsize.models.backward import Ends, backward_walk
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.recipes import shares
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.prune import Prune
from pocketsize.recipes.step import Context
from tiny import write_tiny

# The rest is left alone: the best of six linears can be found by trying all.
ALONE = {f"*.{name}_proj": None for name in ("q", "k", "v", "o")}


def opened(
    tmp_path: Path, step: Prune, *, family: str = "llama", tokens: int = 256
) -> tuple[Model, Prune, Context]:
    write_tiny(tmp_path / "m", family)
    model = load(tmp_path / "m")
    ids = torch.randint(0, 64, (max(1, tokens // 32), min(tokens, 32)), generator=_draw(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    context = Context(ids, mask, open_journal(tmp_path / "work", {}), lambda *_: None)
    return model, step.resolve(model, ("folder",)), context


def _draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sizes(model: Model) -> dict[str, int]:
    searched = [name for name in model.linears if "mlp" in name]
    found = {name: model.matrix_shape(name) for name in searched}
    return {name: shape[0] * shape[1] for name, shape in found.items()}


def mean(found: dict[str, float], count: dict[str, int]) -> float:
    return sum(found[name] * count[name] for name in found) / sum(count.values())


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.85])
def test_a_search_finds_what_trying_all_finds(
    sparsity: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Prune(sparsity=sparsity, allocation="searched", overrides=ALONE)
    model, step, context = opened(tmp_path, step)
    draw, table = _draw(1), dict[str, list[float]]()

    def observed(*given: Any) -> Any:
        for name, W, seen in own(*given):
            table[name] = []
            yield name, W, seen

    def cost(*_: Tensor) -> float:
        last = table[next(reversed(table))]
        last.append((last[-1] if last else 0.0) + float(torch.rand(1, generator=draw)))
        return last[-1]

    own = shares._observed
    monkeypatch.setattr(shares, "_observed", observed)
    monkeypatch.setattr(shares, "linear_cost", cost)
    found, masks = shares.shares_of(step, model, context)
    assert not masks
    table, count = {name: row for name, row in table.items() if row}, sizes(model)
    assert set(found) == set(table) == set(count)
    least, most = max(sparsity - 0.2, 0.01), min(sparsity + 0.2, 0.99)
    levels = torch.linspace(least, most, shares.LEVELS, dtype=torch.float64).tolist()
    room = round(sum(count.values()) * (1 - sparsity))
    best = min(
        sum(table[name][k] for name, k in zip(count, ks, strict=True))
        for ks in itertools.product(range(shares.LEVELS), repeat=len(count))
        if sum(round(count[n] * (1 - levels[k])) for n, k in zip(count, ks, strict=True)) <= room
    )
    over = {
        name: min(range(shares.LEVELS), key=lambda k: abs(levels[k] - share)) for name, share in found.items()
    }
    assert sum(table[name][k] for name, k in over.items()) == pytest.approx(best)
    assert mean(dict(found), count) == pytest.approx(sparsity, abs=0.005)


def test_what_a_linear_loses_is_told_of_the_matrix_it_would_become(tmp_path: Path) -> None:
    model, step, context = opened(tmp_path, Prune(allocation="searched"))
    for path, seen in backward_walk(model, context.input_ids, context.mask, seed=0):
        if isinstance(seen, Ends):
            continue
        for name in model.linears_of(path)[:2]:
            X, _ = seen[name].joined()
            W = model.weight(name).float()
            H = X.float().T @ X.float() / len(X)
            H.diagonal().add_(step.damp * H.diagonal().mean())
            cut = replace(step, update="none", alpha=0.0)
            levels = [0.4, 0.5, 0.6]
            for level, tried in zip(levels, shares._tried(W, X, levels, step, None), strict=True):
                assert float((tried == 0).double().mean()) == pytest.approx(level, abs=0.01)
                (plain,) = shares._tried(W, X, [level], cut, None)
                assert torch.equal(plain, W * (tried != 0))
                best = error(W, refit_slow(W, tried != 0, H).float(), H)
                left, lost = error(W, tried, H), error(W, plain, H)
                # Two rounds win back most of what can be.
                assert best <= left * 1.0001 and lost - left > 0.6 * (lost - best)


@pytest.mark.parametrize("allocation", ["outliers", "taylor", "searched"])
@pytest.mark.parametrize("sparsity", [0.005, 0.5, 0.97, 0.995])
def test_the_share_is_what_was_asked_for(allocation: str, sparsity: float, tmp_path: Path) -> None:
    overrides = {"*.down_proj": sparsity}  # no more than said, and no part of what is spread
    model, step, context = opened(
        tmp_path, Prune(sparsity=sparsity, allocation=allocation, overrides=overrides)
    )
    found, _ = shares.shares_of(step, model, context)
    assert set(found) == {name for name in model.linears if "down_proj" not in name}
    count = {name: math.prod(model.matrix_shape(name)) for name in found}
    assert mean(dict(found), count) == pytest.approx(sparsity, abs=1e-6)


@pytest.mark.parametrize("allocation", ["outliers", "taylor", "searched"])
def test_where_overrides_say_all_nothing_is_spread(allocation: str, tmp_path: Path) -> None:
    given = Prune(allocation=allocation, overrides={"*": 0.6})
    for score in ("alps", "taylor"):
        model, step, context = opened(tmp_path / score, replace(given, score=score))
        assert shares.shares_of(step, model, context)[0] == {}


@pytest.mark.parametrize("allocation", ["taylor", "searched"])
def test_experts_that_no_token_reached_have_a_share(allocation: str, tmp_path: Path) -> None:
    model, step, context = opened(tmp_path, Prune(allocation=allocation), family="mixtral", tokens=1)
    found, _ = shares.shares_of(step, model, context)
    unreached = [
        name
        for path, seen in backward_walk(model, context.input_ids, context.mask, seed=0)
        if not isinstance(seen, Ends)
        for name, one in seen.items()
        if not sum(map(len, one.inputs))
    ]
    assert unreached and all(0.2 < found[name] < 0.8 for name in found)
    if allocation == "searched":
        assert len({found[name] for name in unreached}) == 1 and found[unreached[0]] == 0.5
