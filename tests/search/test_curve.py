"""What each width would cost, told by a plan: sizes as they will be, no way better than the best widths."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

import pocketsize as ps
from pocketsize.cli.main import main
from pocketsize.errors import UnsupportedError
from pocketsize.exporting import table
from pocketsize.recipes.recipe import Data
from pocketsize.search import goal as searching
from search.test_goal import Silent
from tiny import write_texts, write_tiny


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is started to read a folder back, and temporary files go where they are looked for."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(table, "reload_check", lambda *_: ())


def planned(tmp_path: Path, *steps: Any, family: str = "llama", **options: Any) -> ps.Plan:
    source = tmp_path / "m"
    if not source.exists():
        write_tiny(source, family)
    calibrate, evaluate = write_texts(tmp_path)
    data = Data((calibrate,), (evaluate,), sequences=8, length=64, tokens=256, written=0.0)
    options = {"export": ["gguf", "folder"], "out": tmp_path / "o"} | options
    return ps.plan(source, list(steps), data=data, console=Silent(), curve=True, **options)


@pytest.mark.parametrize("export", [["gguf"], ["gguf", "folder"], ["folder"]], ids="+".join)
def test_the_curve_is_below_all_other_ways_of_the_same_grids(export: list[str], tmp_path: Path) -> None:
    found = planned(tmp_path, ps.Gptq("W4A16"), export=export)
    first, *alike = found.ways
    assert first.name == "as planned: gptq W4A16" and first.bytes == found.exports[0].bytes
    assert len(alike) > 4 and all(way.kl > 0 for way in (*found.ways, *found.curve))
    sizes, losses = [p.bytes for p in found.curve], [p.kl for p in found.curve]
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True)
    mixable = [
        w for w in alike if "with zeros" not in w.name and "alike" not in w.name and w.bytes >= sizes[0]
    ]
    assert mixable
    for way in mixable:
        assert min(p.kl for p in found.curve if p.bytes <= way.bytes + 1000) <= way.kl * 1.05, way.name
    assert not list((tmp_path / "temporary").iterdir()) and not (tmp_path / "o").exists()


def test_with_a_goal_it_is_what_shrink_will_choose(tmp_path: Path) -> None:
    sizes = sorted({way.bytes for way in planned(tmp_path, ps.Gptq("W4A16")).ways})
    fit = (sizes[1] + sizes[2]) // 2
    found = planned(tmp_path, fit=fit)
    data = Data(*((str(tmp_path / f"{role}.txt"),) for role in ("calibrate", "evaluate")), 8, 64, 256, 0, 0.0)
    how = {"fit": fit, "target": ["gguf", "folder"], "data": data, "console": Silent()}
    (mixture,) = ps.shrink(tmp_path / "m", out=tmp_path / "small", **how).record.mixtures
    assert found.ways[0] == mixture.chosen and found.curve == mixture.curve
    assert found.exports[0].bytes == mixture.chosen.bytes <= fit
    assert "widths" in mixture.chosen.name and "overrides" in str(found.recipe)
    alike = ps.plan(tmp_path / "m", export=["gguf"], out=tmp_path / "o", fit=fit, data=data, console=Silent())
    told = ["planned-alike" in [one.code for one in each.findings] for each in (alike, found)]
    assert told == [True, False]


def test_what_is_planned_may_be_of_a_turned_model(tmp_path: Path) -> None:
    plain, turned = (
        planned(tmp_path, *steps, ps.Rtn("W4A16")) for steps in ((), (ps.Rotate(residual=True),))
    )
    assert turned.ways[0].name == plain.ways[0].name and turned.ways[0].bytes == turned.exports[0].bytes
    assert turned.ways[0].bytes > plain.ways[0].bytes and turned.ways[0].kl != plain.ways[0].kl


def test_grids_that_are_not_compared_leave_the_others(tmp_path: Path) -> None:
    found = planned(tmp_path, ps.Gptq("W4A16", overrides={"*.down_proj": {"scheme": "W8A16"}}))
    assert found.curve and not any("planned" in way.name for way in found.ways)


def test_formats_with_one_scheme_have_no_curve(tmp_path: Path) -> None:
    found = planned(tmp_path, ps.Gptq("W4A16"), export=["gptq"])
    assert not found.curve and len(found.ways) > 2
    goal = planned(tmp_path, ratio=3.0, export=["gptq"])
    assert not goal.curve and len(goal.ways) > 2
    sizes = [way.bytes for way in goal.ways if not way.name.startswith("as planned")]
    assert goal.exports[0].bytes in sizes


@pytest.mark.parametrize(
    ("family", "steps", "hint"),
    [
        ("bert", (ps.Rtn(),), "not of an encoder"),
        ("mixtral", (ps.Rtn(),), "not of a mixture of experts"),
        ("llama", (ps.Layers(keep=1), ps.Rtn()), "which layers changes first"),
        ("llama", (ps.Prune(),), "prune does not"),
    ],
)
def test_what_is_not_known_is_refused_before_any_work(
    family: str, steps: tuple[Any, ...], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "plan_recipe", lambda *_, **__: pytest.fail("it was planned"))
    with pytest.raises(UnsupportedError, match=hint):
        planned(tmp_path, *steps, family=family, export=["folder"])


def test_the_command_line_tells_it_by_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    texts = write_texts(tmp_path)
    write_tiny(tmp_path / "m", "llama")
    words = ["--length", "64", "--sequences", "8", "--tokens", "256", "--written", "0"]
    words += ["--calibrate", texts[0], "--evaluate", texts[1]]
    assert main(["plan", str(tmp_path / "m"), "--curve", "-o", str(tmp_path / "o"), *words]) == 0
    said = capsys.readouterr().out
    assert "KL predicted" in said and "as planned: gptq W4A16" in said and "8-bit blocks" in said
    assert said.count("best widths within it") >= 8
