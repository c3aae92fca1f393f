"""Widths matrix by matrix: sizes as predicted, less loss than all alike, measured once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketsize.errors import ResourceError
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.recipe import Data, Recipe
from pocketsize.recipes.record import read_record
from pocketsize.recipes.run import prepare
from pocketsize.search import mixed
from pocketsize.search.goal import Goal, predicted_bytes, predicted_step_bytes, shrink
from pocketsize.search.ladder import ladder
from pocketsize.search.mixed import best_mixture, measured
from search.test_goal import Silent
from tiny import write_tiny

DATA = Data(sequences=8, length=64, tokens=256, written=0.0)
EXPORTS = [("gguf",), ("gguf", "folder"), ("folder",)]


def recipe_of(folder: Path, exports: tuple[str, ...]) -> Recipe:
    return Recipe(str(write_tiny(folder / "m", "llama")), (Gptq(),), exports, DATA)


def table_of(recipe: Recipe, kept: Path) -> tuple[Model, Recipe, mixed.Table, list[Gptq]]:
    model, first, texts = prepare(recipe)
    kept.mkdir(exist_ok=True)
    steps = [rung.step().resolve(model, recipe.export) for rung in ladder(model, recipe.export)]
    return model, first, measured(model, texts, steps, recipe.export, kept, lambda *_: None), steps


@pytest.mark.parametrize("exports", EXPORTS, ids=["gguf", "both", "folder"])
def test_mixtures_have_the_bytes_they_say_and_lose_less(exports: tuple[str, ...], tmp_path: Path) -> None:
    model, first, table, steps = table_of(recipe_of(tmp_path, exports), tmp_path / "kept")
    for rung, step in zip(ladder(model, exports), steps, strict=True):
        budget = predicted_bytes(model, first, rung)
        try:
            mixture, found = best_mixture(model, table, exports, budget)
        except ResourceError:
            assert rung.embeddings == "same"
            continue
        assert found.bytes == predicted_step_bytes(model, first, mixture) <= budget
        sizes = [size for size, _ in found.curve]
        assert sizes == sorted(sizes) and sizes[-1] <= budget + 1000
        could_mix = rung.embeddings != "same" and (step.symmetric or exports == ("gguf",))
        assert not could_mix or found.loss <= table.of_step(model, step) * (1 + 1e-9)
    assert all(0 < min(found.values()) < max(found.values()) for found in table.losses.values())


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, ("gguf",))
    first = table_of(recipe, tmp_path / "kept")[2]
    monkeypatch.setattr(mixed, "_measured", lambda *_: pytest.fail("measured twice"))
    assert table_of(recipe, tmp_path / "kept")[2] == first
    (held,) = (tmp_path / "kept").iterdir()
    held.write_bytes(held.read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(pytest.fail.Exception, match="measured twice"):
        table_of(recipe, tmp_path / "kept")


@pytest.mark.parametrize("exports", [("gguf", "folder"), ("folder",)], ids=["both", "folder"])
def test_a_size_between_two_widths_is_used_up(exports: tuple[str, ...], tmp_path: Path) -> None:
    recipe, out = recipe_of(tmp_path, exports), tmp_path / "out"
    model = load(tmp_path / "m")
    sizes = [predicted_bytes(model, recipe, rung) for rung in ladder(model, exports) if rung.symmetric]
    goal = Goal(fit_bytes=(sizes[0] + sizes[1]) // 2)
    record = shrink(recipe, goal, out, console=Silent(), pages={})
    (mixture,) = record.mixtures
    (options,) = (step.options for step in record.steps)
    assert options["overrides"] and "other widths" in mixture.chosen.name
    assert sizes[1] < record.artifacts[0].bytes == mixture.chosen.bytes <= (goal.fit_bytes or 0)
    assert mixture.chosen.kl < min(way.kl for way in mixture.alike)
    assert len({layer.bits for step in record.steps for layer in step.layers[:-1]}) > 1
    assert read_record(out / "record.json").mixtures == record.mixtures
    again = shrink(recipe, goal, out, console=Silent(), pages={})
    assert again.timing == record.timing


def test_keep_tries_the_best_of_each_size(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, ("gguf", "folder"))
    record = shrink(recipe, Goal(keep=0.5), tmp_path / "out", console=Silent(), pages={})
    kept = next(m.value for m in record.measurements if m.name == "perplexity_ratio")
    assert kept >= 0.5 and len(record.mixtures) == 1
