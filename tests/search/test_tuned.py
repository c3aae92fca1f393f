"""A goal with scales that are tuned: the way that meets it is a step `qat` on its grid."""

from __future__ import annotations

from pathlib import Path

from pocketsize import api
from pocketsize.recipes.qat import of_effort
from pocketsize.recipes.recipe import Data
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


def test_much_effort_tunes_what_writes_text() -> None:
    assert of_effort("best", None, writes=lambda: True).kind == "qat"
    assert of_effort("best", None, writes=lambda: False).kind == "gptq"
    assert of_effort("balanced", None, writes=lambda: True).kind == "gptq"
    assert (
        of_effort("fast", "64k", writes=lambda: False).kind == "qat"
    )  # who asks is told, when it is resolved
