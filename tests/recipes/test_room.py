"""What a run takes before it starts: disk to the byte, memory by stage; and runs without room are refused."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pocketsize import api
from pocketsize.cli.main import main
from pocketsize.errors import ResourceError
from pocketsize.exporting import compressed_tensors, plain
from pocketsize.exporting.gguf import writer as gguf
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.recipes import awq
from pocketsize.recipes import room as rooms
from pocketsize.recipes.awq import Awq
from pocketsize.recipes.disk import written_bytes
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.memory import Size, fewer_windows, needed_bytes, stages
from pocketsize.recipes.quantize import Gptq, Rtn
from pocketsize.recipes.recipe import Data, Recipe
from pocketsize.recipes.step import Context
from tiny import FAMILIES, write_texts, write_tiny

TEXT = Data(sequences=4, length=64, tokens=256)
Usage = namedtuple("Usage", "total used free")


def resolved(model: Model, step: Rtn | Gptq | Awq, export: tuple[str, ...] = ("folder",)) -> Recipe:
    return Recipe(str(model.folder), (step,), export, TEXT).resolved(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_files_are_those_that_are_written(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    export = ("gguf", "folder") if model.arch.gguf else ("folder",)
    recipe = resolved(model, Rtn(), export)
    told = written_bytes(model, recipe)
    journal = open_journal(tmp_path / "work", {})
    ids = torch.zeros(1, 1, dtype=torch.int64)
    (step,) = recipe.steps
    done = step.apply(model, Context(ids, ids.bool(), journal, lambda *_: None))
    objects = sum(path.stat().st_size for path in (tmp_path / "work" / "objects").iterdir())
    assert told.work_bytes == objects
    for planned in told.exports:
        out = tmp_path / planned.format
        out.mkdir()
        if planned.format == "gguf":
            gguf.write(done, out / planned.path)
            assert (out / planned.path).stat().st_size == planned.bytes
            continue
        artifact = compressed_tensors.write(done, out)
        assert artifact.bytes == planned.bytes
        others = {p.relative_to(out).as_posix(): p.stat().st_size for p in out.rglob("*") if p.is_file()}
        weights = {name for name in others if name.endswith(".safetensors")}
        expected = compressed_tensors.predict_others(model, _schemes(done))
        assert {name: size for name, size in others.items() if name not in weights} == expected


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "gpt2", "bert"])
def test_vectors_that_awq_changes_are_in_the_plan(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    monkeypatch.setattr(awq, "input_scales", lambda *_, most, **__: torch.ones_like(most))
    ids = torch.randint(5, 300, (8, 40), generator=torch.Generator().manual_seed(0))
    recipe, journal = resolved(model, Awq(embeddings=None)), open_journal(tmp_path / "work", {})
    done = recipe.steps[0].apply(
        model, Context(ids, torch.ones_like(ids, dtype=torch.bool), journal, lambda *_: None)
    )
    objects = sum(path.stat().st_size for path in (tmp_path / "work" / "objects").iterdir())
    assert written_bytes(model, recipe).work_bytes == objects
    assert done.changed and all(not name.endswith("_proj.weight") for name in done.changed)


def test_awq_needs_a_little_more_memory_than_gptq(model: Model) -> None:
    size = Size(windows=64, written=0, length=64, evaluated=256)
    scaled, plain = (peaks(model, resolved(model, step), size, 1000.0)[step.kind] for step in (Awq(), Gptq()))
    assert plain <= scaled < 1.5 * plain


def test_learning_keeps_the_states_of_the_original_too(model: Model) -> None:
    size = Size(windows=64, written=0, length=64, evaluated=256)
    learned, plain = (
        peaks(model, resolved(model, step), size, 1000.0)["gptq"] for step in (Gptq(learn=20), Gptq())
    )
    assert plain < learned < 1.5 * plain


def _schemes(done: Model) -> Any:
    return lambda name: done.quantized[name].scheme if name in done.quantized else None


def test_a_folder_of_shards_is_predicted_with_its_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "SHARD_BYTES", 20_000)
    model = load(write_tiny(tmp_path / "m", "llama"))
    of = lambda name: None  # noqa: E731 - nothing is quantized
    artifact = compressed_tensors.write(model, tmp_path)
    assert artifact.bytes == compressed_tensors.predict_bytes(model, of)
    index = tmp_path / "model.safetensors.index.json"
    assert compressed_tensors.predict_others(model, of)[index.name] == index.stat().st_size


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_tiny(tmp_path_factory.mktemp("room") / "m", "llama"))


def peaks(model: Model, recipe: Recipe, size: Size, waiting: float = 650.0) -> dict[str, int]:
    found = stages(model, recipe, size, base_bytes=500_000_000, waiting=waiting)
    assert all(stage.together_bytes >= max(stage.ram_bytes, 500_000_000) for stage in found)
    return {stage.name: stage.ram_bytes for stage in found}


def test_memory_grows_with_windows_where_they_wait_or_are_written(model: Model) -> None:
    recipe = resolved(model, Gptq())
    few, many = (peaks(model, recipe, Size(n, n // 2, 512, 256)) for n in (64, 4096))
    assert many["gptq"] - few["gptq"] >= 0.9 * (4096 - 64) * 512 * 650
    assert many["write"] > few["write"]
    without = peaks(model, recipe, Size(64, 0, 512, 256))
    assert "write" not in without and "rtn" not in without


def test_memory_grows_with_what_a_token_holds_and_with_the_model(model: Model, tmp_path: Path) -> None:
    recipe, size = resolved(model, Gptq()), Size(1000, 0, 512, 256)
    assert peaks(model, recipe, size, 6500.0)["gptq"] > peaks(model, recipe, size)["gptq"]
    entries = {
        name: replace(e, shape=(1000 * e.shape[0], *e.shape[1:]))
        for name, e in model.checkpoint.entries.items()
    }
    larger = replace(model, checkpoint=replace(model.checkpoint, entries=entries))
    small, large = (peaks(one, recipe, size) for one in (model, larger))
    assert all(large[name] > small[name] for name in small)


def test_rounding_does_not_depend_on_text(model: Model) -> None:
    recipe = resolved(model, Rtn())
    assert peaks(model, recipe, Size(1, 0, 64, 256)) == peaks(model, recipe, Size(4096, 0, 512, 256))


def test_only_a_folder_is_loaded_by_another_process(model: Model) -> None:
    for export, child in ((("folder",), True), (("gguf",), False)):
        recipe = resolved(model, Rtn(), export)
        found = stages(model, recipe, Size(1, 0, 64, 256), base_bytes=1, waiting=0)
        assert any(stage.child_bytes for stage in found) is child


@pytest.mark.parametrize(("room", "most"), [(99, 0), (100, 1), (139, 4), (140, 5), (10**6, 63)])
def test_the_most_windows_that_fit(room: int, most: int) -> None:
    assert fewer_windows(lambda windows: 90 + 10 * windows, 64, room) == most


def texts(windows: int) -> Any:
    shapes = ((count, 512) for count in (windows, 32))
    cut = [SimpleNamespace(input_ids=torch.empty(s), mask=torch.ones(s, dtype=torch.bool)) for s in shapes]
    return SimpleNamespace(calibrate=cut[0], evaluate=cut[1])


def test_what_would_fit_fits_and_one_window_more_does_not(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "rss_bytes", lambda: 500_000_000)
    monkeypatch.setattr(rooms, "available_bytes", lambda: 2_000_000_000)
    recipe = resolved(model, Gptq())
    recipe = replace(recipe, data=replace(recipe.data, written=0.0, sequences=10_000))
    found = rooms.room_of(model, recipe, texts(10_000), tmp_path)
    assert not found.fits and "stage gptq needs" in found.way_out and "2.50 GB are available" in found.way_out
    fits = int(found.way_out.rpartition("--sequences ")[2])
    assert rooms.room_of(model, recipe, texts(fits), tmp_path).fits
    assert not rooms.room_of(model, recipe, texts(fits + 1), tmp_path).fits


def test_nobody_says_what_is_available(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "available_bytes", lambda: None)
    found = rooms.room_of(model, resolved(model, Gptq()), texts(4), tmp_path)
    assert found.fits and found.available_ram_bytes is None
    assert found.needed_ram_bytes == needed_bytes(found.stages)


@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "m", "-o", "out"],
        ["quantize", "m", "--method", "rtn", "-o", "out"],
        ["shrink", "m", "--fit", "1GB", "-o", "out"],
        ["shrink", "m", "--keep", "50%", "-o", "out"],
        ["run", "recipe.yaml", "-o", "out"],
    ],
    ids=["gptq", "rtn", "fit", "keep", "recipe"],
)
def test_a_run_without_memory_is_refused_before_it_starts(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path / "m", "llama")
    (tmp_path / "recipe.yaml").write_text(
        "model: m\nsteps: [gptq]\ndata: {length: 64, calibrate: calibrate.txt, evaluate: evaluate.txt}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rooms, "available_bytes", lambda: 1)
    write_texts(tmp_path)
    before = sorted(tmp_path.iterdir())
    texts = [] if words[0] == "run" else ["--calibrate", "calibrate.txt", "--evaluate", "evaluate.txt"]
    assert main([*words, *texts]) == 5
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "of memory" in said and "use a machine with more memory" in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_without_disk_is_refused_and_one_that_is_half_done_goes_on(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = resolved(model, Rtn())
    needed = written_bytes(model, recipe).peak_bytes
    monkeypatch.setattr(rooms.shutil, "disk_usage", lambda folder: Usage(0, 0, needed - 10))
    work = tmp_path / "work"
    with pytest.raises(ResourceError, match=r"the run writes .* free in .*; free some space"):
        rooms.require_room(model, recipe, texts(4), tmp_path / "out", work)
    work.mkdir()
    (work / "done").write_bytes(bytes(20))
    rooms.require_room(model, recipe, texts(4), tmp_path / "out", work)


def test_the_disk_is_that_of_the_output(tmp_path: Path) -> None:
    assert rooms.free_bytes(tmp_path / "a" / "b")[1] == tmp_path
    assert rooms.free_bytes(Path("nowhere/at/all"))[1] == Path.cwd()


def test_the_whole_output_of_a_run_is_nearly_as_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records in words are estimated: the sizes of all other files are exact."""
    from pocketsize.exporting import table

    monkeypatch.setattr(table, "reload_check", lambda *_: ())
    source, (calibrate, evaluate) = write_tiny(tmp_path / "m", "bert"), write_texts(tmp_path)
    data = replace(TEXT, calibrate=(calibrate,), evaluate=(evaluate,))
    done = api.run(str(source), (Rtn(),), out=tmp_path / "out", data=data)
    model = load(source)
    told = written_bytes(model, resolved(model, Rtn())).output_bytes
    assert abs(told - sum(p.stat().st_size for p in done.folder.rglob("*") if p.is_file())) < 20_000
