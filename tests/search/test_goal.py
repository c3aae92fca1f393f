from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pocketsize.errors import ResourceError, UnsupportedError, UsageError
from pocketsize.models.load import load
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.recipe import Data, Recipe, read_recipe
from pocketsize.search.asked import parse_bytes, parse_ratio, parse_share
from pocketsize.search.goal import (
    Goal,
    plan,
    predicted_bytes,
    shrink,
)
from pocketsize.search.ladder import ladder
from tiny import write_tiny


@pytest.mark.parametrize(
    ("text", "size"), [("80MB", 80_000_000), ("1.5 GiB", 1610612736), ("123", 123), ("10kb", 10_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_shares_and_ratios() -> None:
    assert parse_share("95%") == parse_share("0.95") == 0.95
    assert parse_ratio("4x") == parse_ratio("4") == 4.0


@pytest.mark.parametrize("text", ["", "much", "80 parsecs", "-3MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="80MB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({}, "a goal is needed"),
        ({"keep": 1.2}, "between 0 and 100"),
        ({"ratio": 0.5}, "above 1x"),
        ({"fit_bytes": 0}, "positive"),
    ],
)
def test_goals_that_make_no_sense(goal: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Goal(**goal)  # type: ignore[arg-type]


@pytest.mark.parametrize("exports", [("gguf", "folder"), ("folder",)])
def test_rungs_fall_in_size(exports: tuple[str, ...], tmp_path: Path) -> None:
    """Those of a folder that pack the ends too are a ladder of their own."""
    model = load(write_tiny(tmp_path / "m", "llama"))
    recipe = Recipe(str(model.folder), (Gptq(),), exports)
    for alike in (False, True):
        rungs = [rung for rung in ladder(model, exports) if (rung.embeddings == "same") == alike]
        sizes = [predicted_bytes(model, recipe, rung) for rung in rungs]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


class Silent:
    def phase(self, text: str) -> None: ...

    def progress(self, done: int, total: int, what: str) -> None: ...


def test_the_largest_rung_that_fits_is_run_and_its_size_is_as_predicted(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    recipe = Recipe(
        str(model.folder), (Gptq(),), ("gguf", "folder"), Data(sequences=4, length=64, tokens=256)
    )
    sizes = {rung: predicted_bytes(model, recipe, rung) for rung in ladder(model, recipe.export)}
    middle = sorted(sizes.items(), key=lambda pair: pair[1])[3]
    goal = Goal(fit_bytes=middle[1] + 5)
    record = shrink(recipe, goal, tmp_path / "out", console=Silent(), pages={}, mixed=False)
    assert record.artifacts[0].bytes == middle[1] and not record.mixtures
    alike = replace(recipe, steps=(middle[0].step(),))
    assert record.recipe == alike.resolved(model).to_dict()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_more_room_never_gives_narrower_blocks(kind: str, tmp_path: Path) -> None:
    """Some rungs with wider blocks are smaller than others with narrower ones: their embedding is alike."""
    model = load(write_tiny(tmp_path / "m", kind, blocks=1))
    recipe = Recipe(str(model.folder), (Gptq(),), ("folder",), Data(sequences=4, length=64, tokens=256))
    sizes = {rung: predicted_bytes(model, recipe, rung) for rung in ladder(model, recipe.export)}
    pairs = [(a, b) for a in sizes for b in sizes if a.bits > b.bits and sizes[a] < sizes[b]]
    wide, narrow = max(pairs, key=lambda pair: pair[0].bits - pair[1].bits)
    goal = Goal(fit_bytes=sizes[narrow])
    shrink(recipe, goal, tmp_path / "out", console=Silent(), pages={}, mixed=False)
    (step,) = read_recipe(tmp_path / "out" / "recipe.yaml").steps
    assert isinstance(step, Gptq)
    assert step.scheme == f"W{wide.bits}A16"


def test_keep_takes_the_smallest_rung_that_keeps_enough(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    recipe = Recipe(str(model.folder), (Gptq(),), ("gguf",), Data(sequences=4, length=64, tokens=256))
    record = shrink(recipe, Goal(keep=0.5), tmp_path / "low", console=Silent(), pages={})
    smallest = min(predicted_bytes(model, recipe, rung) for rung in ladder(model, recipe.export))
    assert record.artifacts[0].bytes == smallest
    kept = next(m.value for m in record.measurements if m.name == "perplexity_ratio")
    assert kept >= 0.5


def test_a_size_below_the_possible_names_the_smallest(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    recipe = Recipe(str(model.folder), (Gptq(),), ("gguf",))
    with pytest.raises(ResourceError, match=r"below the smallest gguf file possible.*--fit"):
        shrink(recipe, Goal(fit_bytes=1000), tmp_path / "out", console=Silent(), pages={})
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("ask", [shrink, plan])
def test_what_holds_one_scheme_alone_has_no_widths_to_choose(ask: Any, tmp_path: Path) -> None:
    recipe = Recipe(str(write_tiny(tmp_path / "m", "llama")), (Gptq(),), ("bitsandbytes",))
    pages = {"pages": {}} if ask is shrink else {}
    with pytest.raises(UnsupportedError, match="bitsandbytes holds none; use `quantize --scheme NF4"):
        ask(recipe, Goal(fit_bytes=10**6), tmp_path / "out", console=Silent(), **pages)


def test_a_size_in_bytes_that_no_model_has_asks_for_its_unit(tmp_path: Path) -> None:
    recipe = Recipe(str(write_tiny(tmp_path / "m", "llama")), (Gptq(),), ("gguf",))
    with pytest.raises(
        ResourceError, match=r"0\.1kB \(80 bytes; did you mean 80MB\?\) is below the smallest"
    ):
        plan(recipe, Goal(fit_bytes=80), tmp_path / "out", console=Silent())
