"""Plans on tiny models: what they say, what they refuse, and that they leave nothing behind."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from pocketsize import api
from pocketsize.errors import NumericalError, UnsupportedError, UsageError
from pocketsize.exporting import table
from pocketsize.models.load import load
from pocketsize.recipes import rehearse as rehearsing
from pocketsize.recipes.disk import Export, Written
from pocketsize.recipes.duration import Whole, durations
from pocketsize.recipes.memory import Size
from pocketsize.recipes.plan import Plan
from pocketsize.recipes.quantize import Gptq, Rtn
from pocketsize.recipes.recipe import Data, Recipe, parse_step
from pocketsize.recipes.rehearse import Asked, Rehearsal, Spent
from tiny import write_texts, write_tiny

TEXT = Data(sequences=4, length=64, tokens=256)
FIELDS = (
    *("model", "recipe", "exports", "impossible", "unquantized", "findings", "stages", "trials"),
    *("peak_ram_bytes", "needed_ram_bytes", "available_ram_bytes", "output_disk_bytes", "peak_disk_bytes"),
    *(
        "free_disk_bytes",
        "disk_folder",
        "cpu_s",
        "time_s",
        "rehearsal",
        "rehearsal_time_s",
        "way_out",
        "curve",
        "ways",
    ),
)


class Silent:
    def phase(self, text: str) -> None: ...

    def progress(self, done: int, total: int, what: str) -> None: ...


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that temporary files go to."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def planned(model: Path, *steps: Gptq | Rtn, **options: object) -> Plan:
    """The plan, from texts that are read at once."""
    if "data" not in options:
        calibrate, evaluate = write_texts(model)
        options["data"] = replace(TEXT, calibrate=(calibrate,), evaluate=(evaluate,))
    return api.plan(str(model), steps, console=Silent(), **options)  # type: ignore[arg-type]


def test_a_plan_of_the_default_rehearses_both_exports_and_leaves_nothing(tmp_path: Path, place: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    before = {p: p.stat().st_mtime_ns for p in source.rglob("*")}
    found = planned(source, out=tmp_path / "out", data=TEXT)
    assert found.exit_code == 0 and not found.way_out and not found.impossible
    assert [export.format for export in found.exports] == ["gguf", "folder"]
    assert [s.name for s in found.stages] == ["load", "write", "gptq", "measure", "export", "latency"]
    assert all((s.cpu_s or 0) > 0 and (s.time_s or 0) > 0 for s in found.stages)
    assert found.rehearsal.startswith("model.layers.1 was calibrated") and found.rehearsal_time_s
    assert (found.peak_ram_bytes or 0) <= (found.needed_ram_bytes or 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "temporary"]
    assert not list(place.iterdir()) and before == {p: p.stat().st_mtime_ns for p in source.rglob("*")}
    raw = json.loads(found.to_json())
    assert tuple(raw) == (*FIELDS, "exit_code") and tuple(f.name for f in fields(Plan)) == FIELDS
    assert raw["stages"][2]["name"] == "gptq" and raw["recipe"]["steps"][0]["gptq"]["group"] == 32


def test_a_rehearsal_that_fails_says_where_and_leaves_nothing(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        assert list(place.iterdir())
        raise NumericalError("the numbers are not finite")

    monkeypatch.setattr(rehearsing, "publish", broken)
    with pytest.raises(NumericalError, match=r"rehearsal of model.layers.1: the numbers are not finite"):
        planned(write_tiny(tmp_path / "m", "llama"), Rtn(), out=tmp_path / "out")
    assert not list(place.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "temporary"]


@pytest.mark.parametrize(
    ("family", "step", "export", "reason"),
    [
        ("bert", Rtn(), ("gguf",), "no GGUF is written for the family bert"),
        ("qwen2", Gptq(), ("folder", "gguf"), "no GGUF is written for the family qwen2"),
        ("llama", Gptq(scheme="W3A16"), ("gguf",), "gguf cannot store 3-bit weights"),
        ("llama", Gptq(group=64), ("gguf",), "group"),
        ("llama", Gptq(group=48), ("folder",), "group 48 does not divide"),
        ("llama", Gptq(scheme="W8A16", symmetric=False), ("gguf",), "no 8-bit type with zeros"),
        ("mixtral", Gptq(symmetric=False), ("folder",), "packed experts without zeros"),
        ("squeezebert", Rtn(), ("folder",), "grouped convolutions"),
    ],
    ids=["family", "one of two", "bits", "group of a file", "group", "zeros", "experts", "refused family"],
)
def test_what_cannot_be_done_is_named_with_its_reason(
    family: str, step: Gptq | Rtn, export: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    if family == "llama" and step.group == 64:
        step = replace(step, group=16)
        reason = "cannot store group 16"
    found = planned(write_tiny(tmp_path / "m", family), step, export=export)
    assert found.exit_code == 4 and not found.stages and not found.rehearsal
    asked = [one for one in found.impossible if one.asked]
    assert asked and reason in asked[0].reason and asked[0].format in export


def test_exports_that_are_possible_alone_but_not_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Recipe.resolved

    def alone(self: Recipe, model: object) -> Recipe:
        if len(self.export) > 1:
            raise UnsupportedError("these two have no group in common")
        return real(self, model)  # type: ignore[arg-type]

    monkeypatch.setattr(Recipe, "resolved", alone)
    found = planned(write_tiny(tmp_path / "m", "llama"), Rtn(), export=("gguf", "folder"))
    assert found.exit_code == 4
    assert {one.format for one in found.impossible} == {"gguf", "folder"}


def test_what_was_not_asked_for_is_told_too_and_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "reload_check", lambda *_: ())
    found = planned(write_tiny(tmp_path / "m", "bert"), Rtn())
    assert found.exit_code == 0
    assert [(one.format, one.asked) for one in found.impossible] == [
        (name, False) for name in ("gguf", "gptq", "gptq_v2")
    ]
    roles = {kept.role: kept for kept in found.unquantized}
    assert set(roles) == {"embedding", "norm", "bias", "other"}
    assert all(kept.why and kept.parameters for kept in found.unquantized)
    assert "embeddings: null" in roles["embedding"].why


def test_an_embedding_packed_as_the_linears_are_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "reload_check", lambda *_: ())
    found = planned(write_tiny(tmp_path / "m", "bert"), Rtn(embeddings="same"))
    assert {kept.role for kept in found.unquantized} == {"norm", "bias", "other"}


@pytest.mark.parametrize("kind", ["gptq", "awq", "hqq", "smoothquant"])
def test_a_block_that_is_left_as_it_is_is_told_and_run_through(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, export = parse_step({kind: {"overrides": {"model.layers.1.*": None}}}), "gguf"
    if kind == "smoothquant":
        export = "folder"
        monkeypatch.setattr(table, "reload_check", lambda *_: ())
    found = planned(write_tiny(tmp_path / "m", "llama"), left, export=(export,))  # type: ignore[arg-type]
    (kept,) = (kept for kept in found.unquantized if kept.role == "compressible")
    assert kept.tensors == 7 and kept.why == "an override leaves it"
    assert found.exit_code == 0


def test_a_plan_that_does_not_fit_is_not_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketsize.recipes import room as rooms

    monkeypatch.setattr(rooms, "available_bytes", lambda: 1)
    found = planned(write_tiny(tmp_path / "m", "llama"))
    assert found.exit_code == 5 and "use a machine with more memory" in found.way_out
    assert found.stages and found.time_s is None and not found.rehearsal


def test_a_goal_or_a_recipe_leaves_no_step_to_choose(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    with pytest.raises(UsageError, match="a goal chooses the step itself"):
        planned(source, Rtn(), fit="1GB")
    (tmp_path / "r.yaml").write_text("model: m\nsteps: [rtn]\n")
    for call in (api.plan, api.run):
        with pytest.raises(UsageError, match="a recipe has steps of its own"):
            call(tmp_path / "r.yaml", (Rtn(),), out=tmp_path / "out")


def test_a_goal_is_planned_as_shrink_would_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketsize.recipes import plan as planning

    monkeypatch.setattr(planning, "rehearse", lambda *_, **__: rehearsal())
    source = write_tiny(tmp_path / "m", "llama")
    small, kept = (
        planned(source, **{"export": ("gguf",), **goal}) for goal in ({"fit": 80_000}, {"keep": "90%"})
    )
    assert small.trials == 1 and small.exports[0].bytes <= 80_000
    assert kept.trials == 9
    assert (kept.peak_disk_bytes or 0) > (kept.output_disk_bytes or 0)


def rehearsal() -> Rehearsal:
    stages = {
        "write": Spent(cpu_s=4.0, wall_s=8.0, block_s=1.0),
        "gptq": Spent(cpu_s=3.0, wall_s=3.0, units=[1.0, 2.5]),
        "measure": Spent(cpu_s=2.0, wall_s=1.0, block_s=0.5),
        "export": Spent(cpu_s=9.0, wall_s=9.0, block_s=1.0, child_s=2.0),
        "latency": Spent(cpu_s=1.0, wall_s=1.0, block_s=0.25),
    }
    return Rehearsal(
        block=1,
        batch_s=0.25,
        walk_s=0.75,
        batches=2,
        evaluated_tokens=128,
        parameters=1000,
        calls=(0.5,) * 64,
        stages=stages,
        file=None,
        wall_s=20.0,
    )


SIZE = Size(64, 32, 512, 1024)


def took(tmp_path: Path, one: Rehearsal, **options: Any) -> dict[str, tuple[float, float]]:
    """CPU and wall seconds of the stages of a model of two blocks and 3000 parameters."""
    model = load(write_tiny(tmp_path / "m", "llama"))
    model = replace(model, origin=replace(model.origin, parameters=3000))
    recipe = Recipe("m", (Gptq(**options),), ("gguf",), TEXT)
    disk = Written((Export("gguf", "m.gguf", 300),), 300, 0)
    whole = Whole(model, recipe, SIZE, disk, model)
    return {t.name: (round(t.cpu_s, 6), round(t.time_s, 6)) for t in durations(whole, one)}


def test_times_of_all_blocks_follow_from_one(tmp_path: Path) -> None:
    found = took(tmp_path, rehearsal())
    # 512 tokens: the block at each of both, a 64th of what else the rehearsed 64 took; twice by the clock.
    assert found["write"] == (512 * (2 * 0.5 + 3 / 64), 2 * 512 * (2 * 0.5 + 3 / 64))
    # 16 batches and 0.25 s of quantization in each of two blocks; the ends; what is done around once.
    assert found["gptq"][0] == 2 * (16 * 0.25 + 0.25) + 1.5 + 0.25
    # Eight times the tokens, half the seconds by the clock.
    assert found["measure"] == (8 * 2.5, 4 * 2.5)
    # The child once, the block twice, the rest as often as there are more parameters.
    assert found["export"][0] == 2 + 2 * 1 + 3 * 6
    assert found["latency"][0] == 1.25


@pytest.mark.parametrize(
    ("options", "passes"), [({"alpha": 0.25}, 2.5), ({"beta": 0.2}, 1), ({"learn": 9}, 3.5)]
)
def test_each_stage_has_passes_of_its_own_and_is_judged(
    tmp_path: Path, options: dict[str, Any], passes: float
) -> None:
    one = rehearsal()
    one.stages["gptq"] = Spent(cpu_s=9.0, wall_s=9.0, units=[1.0, 2.5, 6.5, 7.5])
    plain = 2 * (16 * 0.25 + 0.25) + 1.5 + 0.25
    # The second stage began when the first was measured, 2 s after it.
    second = 2 * (16 * passes * 0.25 + max(0.0, 2 - 0.25 - 2 * passes * 0.25)) + 1 + 0.25
    judged = 2 * 64 * (2 + 0.5)  # 64 times the tokens that the rehearsal measured
    assert took(tmp_path, one, **options)["gptq"][0] == plain + second + judged


def test_a_file_costs_by_its_size_and_questions_by_their_number(tmp_path: Path) -> None:
    alone = took(tmp_path / "a", rehearsal())
    asked = Asked(bytes=100, prompt_s=0.001, token_s=0.01, question_s=0.001)
    with_file = took(tmp_path / "b", replace(rehearsal(), file=asked))
    questions = 1024 * 0.001
    assert with_file["export"][0] == pytest.approx(alone["export"][0] - 2 * questions + 1024 * 0.01 * 2)
    assert with_file["latency"][0] > alone["latency"][0]


def test_writing_slows_down_as_the_text_grows(tmp_path: Path) -> None:
    slower = replace(rehearsal(), calls=tuple(0.5 + 0.01 * i for i in range(64)))
    even, rising = (took(tmp_path / str(i), one) for i, one in enumerate((rehearsal(), slower)))
    # Seconds of call i are 0.5 + 0.01 i, so the 512 of each of two blocks take 2 (256 + 0.01 * 512^2 / 2).
    assert rising["write"][0] - even["write"][0] == pytest.approx(2 * 0.01 * 512**2 / 2, rel=0.02)


def test_planned_stages_are_plain_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "reload_check", lambda *_: ())
    found = planned(write_tiny(tmp_path / "m", "llama"), Rtn(), export=("folder",))
    assert [set(asdict(s)) for s in found.stages] == [
        {"name", "ram_bytes", "child_ram_bytes", "cpu_s", "time_s"}
    ] * 5


def test_the_original_is_measured_too_however_small_the_student_is(tmp_path: Path) -> None:
    """One block stands for both: here the original has six of the kind that the student has one of."""
    student, original = (
        load(write_tiny(tmp_path / str(blocks), "llama", blocks=blocks)) for blocks in (1, 6)
    )
    recipe = Recipe("m", (Gptq(),), ("gguf",), TEXT)
    disk = Written((Export("gguf", "m.gguf", 300),), 300, 0)
    alone, both = (
        {t.name: t.cpu_s for t in durations(Whole(student, recipe, SIZE, disk, one), rehearsal())}
        for one in (student, original)
    )
    spent = rehearsal().stages
    assert both["latency"] - alone["latency"] == pytest.approx(5 * spent["latency"].block_s)
    more = SIZE.evaluated / rehearsal().evaluated_tokens
    assert both["measure"] - alone["measure"] == pytest.approx(2.5 * more * spent["measure"].block_s)
