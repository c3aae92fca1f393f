"""Steps that make another model are timed on a few of its blocks: the sum, and that all steps can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pocketsize as ps
from pocketsize.models.left_out import head_work, pick_work
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.surgery import Sizes
from pocketsize.recipes import stretch
from pocketsize.recipes.body import Layers
from pocketsize.recipes.gate import Gate
from pocketsize.recipes.recipe import Data
from pocketsize.recipes.rotate import Rotate
from pocketsize.recipes.stretch import Stretched, stretched_time
from pocketsize.recipes.student import Student
from tiny import VOCAB, write_texts, write_tiny

STEPS: list[Stretched] = [
    Layers(remove=0.5),
    Layers(keep=(0, 3, 4), heal=True),
    Layers(remove=0.34, pick="kl"),
    Layers(keep=4, pick="influence", heal=False),
    Layers(keep=4, pick="taylor"),
    Student(remove=0.25),
    Student(heads=2, kv_heads=1, importance="kl"),
    Student(ffn=64, importance="kl", heal=False),
    Student(vocabulary=300),
    Student(family="llama", layers=2, hidden=32),
    Rotate(values=True, residual=True),
    Gate(),
    Gate(skip="channels"),
    Gate(skip="layers"),
    Gate(skip="exit"),
]


class Quiet:
    def phase(self, text: str) -> None: ...

    def progress(self, done: int, total: int, what: str) -> None: ...


def data(folder: Path) -> Data:
    calibrate, evaluate = write_texts(folder)
    return Data((calibrate,), (evaluate,), sequences=16, length=64, tokens=256, written=0.0)


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_every_stage_has_a_time_and_nothing_is_left(step: Stretched, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama", blocks=6)
    options = data(tmp_path)
    before = {*tmp_path.iterdir()}
    found = ps.plan(source, [step], out=tmp_path / "o", export=["folder"], data=options, console=Quiet())
    assert {*tmp_path.iterdir()} == before and found.exit_code == 0
    assert all(stage.time_s is not None and stage.cpu_s is not None for stage in found.stages)
    most = {Layers: 4, Student: 2, Rotate: 2, Gate: 3 if step == Gate(skip="exit") else 2}[type(step)]
    assert f"{step.kind} was done on {most} of 6 blocks" in found.rehearsal
    assert "was measured, saved and read back: folder" in found.rehearsal


@pytest.mark.parametrize("family", ["bert", "gpt2", "gemma3_text"])
def test_other_families_too(family: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", family, blocks=5)
    steps = [Layers(remove=0.4)]
    found = ps.plan(
        source, steps, out=tmp_path / "o", export=["folder"], data=data(tmp_path), console=Quiet()
    )
    assert all(stage.time_s is not None for stage in found.stages)


def clockwork(monkeypatch: pytest.MonkeyPatch, work: Any) -> list[Stretched]:
    """A step takes 3 CPU seconds and 2 for each of its work, and half of that by the clock."""
    done: list[Stretched] = []

    def fake(step: Stretched, model: Model, *_: object) -> tuple[float, float]:
        done.append(step)
        taken = 3 + 2 * work(step, model)
        return taken, taken / 2

    monkeypatch.setattr(stretch, "_done", fake)
    return done


def told(step: Stretched, model: Model) -> tuple[float, float]:
    took, _ = stretched_time(step, model, None, seed=0)  # type: ignore[arg-type]
    return took.cpu_s, 2 * took.time_s


def test_what_grows_with_the_blocks_grows_as_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", blocks=7))
    done = clockwork(monkeypatch, lambda step, short: len(short.blocks))
    for step in (Rotate(values=True, residual=True), Student(ffn=64, heal=True), Gate(save=0.2)):
        assert told(step, model) == (3 + 2 * 7, 3 + 2 * 7)
    assert done[-1] == Gate(save=1e-3)
    short = load(write_tiny(tmp_path / "s", "llama", blocks=2))
    assert told(Rotate(values=True, residual=True), short) == (3 + 2 * 2, 3 + 2 * 2)


@pytest.mark.parametrize("step", [Layers(keep=9, heal=True), Layers(keep=3, pick="taylor", heal=False)])
def test_all_blocks_are_passed_and_those_that_stay_are_healed(
    step: Layers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", blocks=12))
    done = clockwork(monkeypatch, lambda step, short: len(short.blocks) + 5 * step.keep)
    wanted = 3 + 2 * (12 + 5 * int(step.keep or 0))  # type: ignore[arg-type]
    assert told(step, model) == (pytest.approx(wanted), pytest.approx(wanted))
    assert {one.pick for one in done if isinstance(one, Layers)} == {step.pick}
    listed = Layers(keep=tuple(range(9)), pick="kl", heal=True)
    assert told(listed, model)[0] == pytest.approx(3 + 2 * (12 + 5 * 9))


def test_exits_cost_by_the_exit_and_by_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", blocks=9))
    clockwork(monkeypatch, lambda step, short: 7 * len(short.blocks) + len(step.exits))
    step = Gate(skip="exit", exits=(1, 3, 5, 7), agree=0.9)
    assert told(step, model)[0] == pytest.approx(3 + 2 * (7 * 9 + 4))


def test_measuring_parts_grows_faster_than_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", blocks=12))

    def rounds(step: Any, blocks: int, keep: int) -> float:
        return blocks + 5 * keep + (pick_work(model, blocks, keep) if step.pick == "kl" else 0)

    clockwork(monkeypatch, lambda step, short: rounds(step, len(short.blocks), step.keep))
    step = Layers(keep=9, pick="kl", heal=True)
    assert told(step, model)[0] == pytest.approx(3 + 2 * rounds(step, 12, 9))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (4, 2)])
def test_heads_that_are_left_out_grow_with_the_square(
    heads: int, kv_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", blocks=12))
    sizes = Sizes(heads, kv_heads, 128, 64, VOCAB)

    def work(step: Any, blocks: int) -> float:
        return 4 * blocks + (head_work(model, sizes, blocks) if step.importance == "kl" else 0)

    clockwork(monkeypatch, lambda step, short: work(step, len(short.blocks)))
    step = Student(heads=heads, kv_heads=kv_heads, ffn=64, importance="kl", heal=True)
    assert told(step, model)[0] == pytest.approx(3 + 2 * work(step, 12))


def test_what_seems_to_take_less_than_nothing_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", blocks=12))
    clockwork(monkeypatch, lambda step, short: -len(short.blocks))
    assert told(Rotate(values=True, residual=True), model)[0] == 3 - 2
