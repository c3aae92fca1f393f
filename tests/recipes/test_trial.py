from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pocketsize as ps
from pocketsize.exporting import table
from pocketsize.recipes import qat, trial
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill
from pocketsize.recipes.qat import Qat
from pocketsize.recipes.quantize import Rtn
from pocketsize.recipes.recipe import Data
from pocketsize.training.rounded import put_on_grids
from tiny import write_texts, write_tiny


class Quiet:
    def phase(self, text: str) -> None: ...

    def progress(self, done: int, total: int, what: str) -> None: ...


def _near(told: float | None, took: float) -> bool:
    """Within what a busy machine may put between two moments; what is exact is tested with a clock."""
    return told is not None and took / 8 < told + 1 and told < 8 * took + 5


class Clock:
    """A second passes each time that somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now


@pytest.mark.parametrize(("enough", "tried"), [(1.0, 2), (3.0, 4), (1000.0, 156)])
def test_the_time_of_a_step_counts_as_often_as_there_are_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough: float, tried: int
) -> None:
    """Here each takes a second, and so does what comes before the first."""
    clock = Clock()
    monkeypatch.setattr(trial, "time", clock)
    monkeypatch.setattr(trial, "cpu_seconds", lambda: 2 * clock.now)
    monkeypatch.setattr(trial, "ENOUGH_S", enough)
    source = write_tiny(tmp_path / "m", "llama")
    calibrate, evaluate = write_texts(tmp_path)
    data = Data((calibrate,), (evaluate,), sequences=8, length=64, tokens=256, written=0.0)
    step = Distill(tokens="40k", batch=4, length=64)
    found = ps.plan(source, [step], out=tmp_path / "o", export=["folder"], data=data, console=Quiet())
    (told,) = (stage for stage in found.stages if stage.name == "distill")
    assert (told.time_s, told.cpu_s) == (156, 2 * 156)
    assert f"distill was tried for {tried} steps" in found.rehearsal


def test_a_training_is_planned_from_some_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "reload_check", lambda *_: ())
    source = write_tiny(tmp_path / "m", "llama")
    calibrate, evaluate = write_texts(tmp_path)
    data = Data((calibrate,), (evaluate,), sequences=8, length=64, tokens=256, written=0.0)
    steps = [Layers(keep=1), Distill(tokens="40k", batch=4, length=64)]
    before = {*tmp_path.iterdir()}
    found = ps.plan(source, steps, out=tmp_path / "o", export=["folder"], data=data, console=Quiet())
    assert {*tmp_path.iterdir()} == before and found.exit_code == 0
    stages = {stage.name: stage for stage in found.stages}
    assert "distill was tried for " in found.rehearsal
    done = ps.run(source, steps, out=tmp_path / "o", export=["folder"], data=data, console=Quiet())
    took = done.record.timing.phases_s["distill"]
    assert _near(stages["distill"].time_s, took)
    assert found.exports[0].bytes == (tmp_path / "o" / "model.safetensors").stat().st_size
    assert "compressible" in {kept.role for kept in found.unquantized}

    whole = ps.plan(
        source, [*steps, Rtn()], out=tmp_path / "p", export=["folder"], data=data, console=Quiet()
    )
    stages = {stage.name: stage for stage in whole.stages}
    assert all(stages[name].time_s for name in ("distill", "rtn", "measure", "export"))
    assert whole.peak_disk_bytes is not None and found.peak_disk_bytes is not None


def test_minutes_are_taken_at_their_word(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "bert")
    calibrate, evaluate = write_texts(tmp_path)
    data = Data((calibrate,), (evaluate,), sequences=8, length=64, tokens=256)
    step = Distill(minutes=5.0, batch=4, length=32)
    found = ps.plan(source, [step], out=tmp_path / "o", export=["folder"], data=data, console=Quiet())
    assert {s.name: s.time_s for s in found.stages}["distill"] == 300


def test_tuning_is_rehearsed_with_scales_that_learn_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with all weights, which would take more time and memory than the run does."""
    source = write_tiny(tmp_path / "m", "llama")
    calibrate, evaluate = write_texts(tmp_path)
    data = Data((calibrate,), (evaluate,), sequences=8, length=64, tokens=256, written=0.5)
    learned: list[bool] = []

    def put(*given: Any, codes: bool, **named: Any) -> Any:
        learned.append(codes)
        return put_on_grids(*given, codes=codes, **named)

    monkeypatch.setattr(qat, "put_on_grids", put)
    step = Qat(scheme="W4A16", group=32, codes=False, learn=2, tokens="20k", batch=2, length=64)
    found = ps.plan(source, [step], out=tmp_path / "o", export=["folder"], data=data, console=Quiet())
    assert learned == [False] and "qat was tried for " in found.rehearsal
    stages = {stage.name: stage.time_s for stage in found.stages}
    done = ps.run(source, [step], out=tmp_path / "o", export=["folder"], data=data, console=Quiet())
    took = done.record.timing.phases_s
    assert learned == [False, False] and {"write", "qat"} <= {*took}
    assert _near(stages["qat"], took["qat"]) and _near(stages["write"], took["write"])
