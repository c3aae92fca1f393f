"""A goal with scales that are tuned: the way that meets it is a step `qat` on its grid."""

from __future__ import annotations

from pathlib import Path

from pocketsize import api
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.recipe import Data, Recipe
from pocketsize.search.goal import Way, with_way
from tiny import write_texts, write_tiny


def test_the_way_that_meets_a_goal_is_tuned(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m", "llama")
    texts = write_texts(tmp_path)
    data = Data(calibrate=(texts[0],), evaluate=(texts[1],), sequences=8, length=32, tokens=256)
    found = api.shrink(
        str(model), out=tmp_path / "out", ratio=2.0, tune="2k", target=["gguf"], data=data, mixed=False
    )
    (step,) = found.record.steps
    assert step.kind == "qat" and step.options["codes"] is False and step.training is not None
    assert [stage.name for stage in step.stages] == ["gptq", "tuned"]


def test_what_was_asked_for_stays_on_the_grid_of_a_way() -> None:
    recipe = Recipe("m", (Gptq(learn=3, alpha=0.25),), ("gguf",))
    (step,) = with_way(recipe, Way("3-bit", Gptq("W3A16", embeddings=4), 1)).steps
    assert step == Gptq("W3A16", embeddings=4, learn=3, alpha=0.25)
