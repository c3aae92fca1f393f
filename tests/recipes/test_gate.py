from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import pocketsize as ps
from pocketsize.cli import chat, measure
from pocketsize.errors import DataError, UnsupportedError, UsageError
from pocketsize.models.gates import NAME, read_gates, sites
from pocketsize.models.gating import Choice, gauged, settled
from pocketsize.models.load import load
from pocketsize.models.skipping import Leave, early_exits, skipped_halves
from pocketsize.recipes.gate import Gate
from pocketsize.recipes.recipe import Recipe, parse_step
from tiny import VOCAB, write_texts, write_tiny


class Silent:
    """A console that says nothing."""

    def phase(self, text: str) -> None: ...

    def progress(self, done: int, total: int, what: str) -> None: ...


def windows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, VOCAB, (6, 24), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids, dtype=torch.bool)


def run(folder: Path, step: ps.Gate, *more: object, export: tuple[str, ...] = ("folder",)) -> ps.Result:
    model = folder / "model"
    if not model.exists():
        write_tiny(model, "llama")
    train, held_out = write_texts(folder)
    data = ps.Data((train,), (held_out,), sequences=8, length=16, tokens=64, written=0.0)
    steps = (step, *more)
    return ps.run(model, steps, out=folder / "out", export=export, data=data, console=Silent(), dtype="fp32")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "most"),
    [
        (Gate(save=0.3), 0.36),
        (Gate(save=0.2, head=False, score="magnitude", spread="uniform"), 0.26),
        (Gate(skip="channels", save=0.1), 0.14),
        (Gate(skip="layers", save=0.1), 0.3),
        (Gate(skip="exit", save=0.05, exits=(0,), rank=3), 0.4),
    ],
)
def test_a_folder_with_gates_saves_what_was_asked_and_keeps_its_weights(
    step: ps.Gate, most: float, tmp_path: Path
) -> None:
    done = run(tmp_path, step)
    saved = done.measurements["operations_saved of gated"]
    assert 0.0 < saved.value <= most
    for name in ("kl_mean", "top1", "perplexity", "perplexity_ratio", "block_operations_saved"):
        assert f"{name} of gated" in done.measurements
    assert "gates-apart" in [finding.code for finding in done.record.findings]
    assert all(check.ok for check in ps.verify(done.folder))
    assert NAME in json.loads((done.folder / "MANIFEST.json").read_text())
    model, original = load(done.folder), load(tmp_path / "model")
    assert all(torch.equal(model.original(n), original.original(n)) for n in original.checkpoint.entries)
    ids = windows()[0]
    with ps.gated(done.folder) as (module, tally):
        module(input_ids=ids, use_cache=False)
    assert tally.tokens == ids.numel() and tally.share != 0.0


def test_measure_tells_of_gates_and_chat_that_it_has_none(tmp_path: Path) -> None:
    done = run(tmp_path, Gate(save=0.3), export=("folder", "gguf"))
    asked = [str(done.folder), "--data", str(tmp_path / "*.txt"), "--tokens", "64", "--json"]
    told = CliRunner().invoke(measure.command, asked, catch_exceptions=False)
    rows = {(row["name"], row["subject"]): row["value"] for row in json.loads(told.stdout)["measurements"]}
    assert 0 < rows["operations_saved", "gated"] < 1
    assert rows["decode_rate", "gated"] > 0 and rows["decode_rate", "without gates"] > 0
    said = CliRunner().invoke(chat.command, [str(done.folder), "--prompt", "A", "--tokens", "1"])
    assert "runs without the gates" in said.stderr


def test_gates_go_with_quantized_weights_and_not_with_other_ones(tmp_path: Path) -> None:
    done = run(tmp_path, Gate(save=0.2), ps.Rtn(scheme="W8A16", group=32))
    assert "operations_saved of gated" in done.measurements
    data = ps.Data((str(tmp_path / "*.txt"),), sequences=4, length=16, tokens=64, written=0.0)
    plain = tmp_path / "with"
    write_tiny(plain, "llama")
    (plain / NAME).write_bytes((done.folder / NAME).read_bytes())
    again = ps.quantize(
        plain, out=tmp_path / "again", method="rtn", group=32, export=["folder"], data=data, console=Silent()
    )
    assert "gates-dropped" in [finding.code for finding in again.record.findings]
    assert not (again.folder / NAME).exists()


def test_a_run_that_was_cut_off_gives_the_same_gates(tmp_path: Path) -> None:
    first = run(tmp_path / "a", Gate(save=0.3))
    second = run(tmp_path / "b", Gate(save=0.3))
    assert (first.folder / NAME).read_bytes() == (second.folder / NAME).read_bytes()


def test_the_plan_of_a_gate_tells_its_memory(tmp_path: Path) -> None:
    train, held_out = write_texts(tmp_path)
    data = ps.Data((train,), (held_out,), sequences=8, length=16, tokens=64, written=0.0)
    model = write_tiny(tmp_path / "m", "llama")
    found = ps.plan(model, [Gate(save=0.2)], export=["folder"], data=data, console=Silent())
    assert [stage.name for stage in found.stages] == ["load", "gate", "measure", "export", "latency"]
    assert found.exit_code == 0 and all(stage.ram_bytes > 0 for stage in found.stages)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "gemma2", "gpt_neox"])
def test_more_is_saved_where_it_costs_less(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    ids, mask = windows()
    for kind in ("inputs", "channels"):
        (places,) = gauged(model, [Choice(kind)], ids, mask)
        gates, more = (settled(model, kind, places, save=share, length=24) for share in (0.05, 0.06))
        assert list(gates.values) == list(sites(model, kind))
        assert all(bool((t >= 0).all()) for t in gates.values.values())
        assert all(bool((more.values[n] >= t).all()) for n, t in gates.values.items())


def test_exits_agree_as_wished_on_calibration_text(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    ids, mask = windows()
    for confidence in ("probe", "probability", "entropy", "saturation"):
        strict, lax = (
            early_exits(model, ids, mask, Leave((0,), confidence, agree=share, rank=2))
            for share in (1.0, 0.3)
        )
        (path,) = strict.values
        assert float(lax.values[path]) <= float(strict.values[path])
    with pytest.raises(UsageError, match="no level of probe saves as much"):
        early_exits(model, ids, mask, Leave((0,), "probe", save=0.9))


def test_too_much_cannot_be_saved(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    with pytest.raises(UsageError, match="million are to be saved"):
        settled(model, "channels", gauged(model, [Choice("channels")], *windows())[0], save=0.9, length=24)
    with pytest.raises(UsageError, match="million are to be saved"):
        skipped_halves(model, *windows(), save=0.99)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"save": 0}, "above 0 and below 1; got 0"),
        ({"save": 1}, "above 0 and below 1; got 1"),
        ({"save": -0.5}, "above 0 and below 1"),
        ({"skip": "input"}, "unknown skip 'input'; did you mean 'inputs'"),
        ({"score": "size"}, "unknown score 'size'"),
        ({"skip": "exit", "agree": 1.5}, "agree is a share of tokens"),
        ({"agree": 0.9}, "agree is for skip: exit, not for inputs"),
        ({"skip": "layers", "head": False}, "head is for skip: inputs, not for layers"),
        ({"skip": "exit", "save": 0.2, "agree": 0.9}, "give one of them"),
        ({"score": "magnitude"}, "spread: uniform"),
        ({"skip": "exit", "exits": [3, 1]}, "rising, each once"),
        ({"skip": "exit", "exits": []}, "rising, each once"),
        ({"skip": "exit", "rank": -1}, "rank must be 0"),
        ({"skip": "exit", "confidence": "sure"}, "unknown confidence 'sure'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_step({"gate": options})


def test_models_and_recipes_without_a_place_for_gates_are_refused_before_work(tmp_path: Path) -> None:
    llama, bert = (load(write_tiny(tmp_path / f, f)) for f in ("llama", "bert"))
    with pytest.raises(UnsupportedError, match="for models that generate"):
        Gate().resolve(bert, ("folder",))
    with pytest.raises(UnsupportedError, match="gguf has no place for gates"):
        Gate().resolve(llama, ("gguf",))
    with pytest.raises(UsageError, match="exits: 1; the model has 2 blocks"):
        Gate(skip="exit", exits=(1,)).resolve(llama, ("folder",))
    assert Gate(skip="exit").resolve(llama, ("folder",)) == Gate(skip="exit", agree=0.95, exits=(0,))
    assert Gate().resolve(llama, ("folder",)) == Gate(save=0.25)
    with pytest.raises(UsageError, match="only what quantizes comes after gate"):
        Recipe("m", (Gate(), ps.Layers(keep=1)))
    with pytest.raises(UsageError, match="make gates with the recipe step"):
        ps.gated(llama).__enter__()


def test_a_file_edited_by_hand_stops_measure(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    (model.folder / NAME).write_text('{"format": 1, "kind": "inputs"}')
    with pytest.raises(DataError, match="calibrate anew"):
        read_gates(replace(model))


@pytest.mark.parametrize(("skip", "loses"), [("exit", True), ("inputs", False)])
def test_gates_that_ask_for_more_than_they_save_are_told_of(skip: str, loses: bool, tmp_path: Path) -> None:
    done = run(tmp_path, Gate(skip=skip))
    saved = done.measurements["operations_saved of gated"].value
    codes = [finding.code for finding in done.record.all_findings]
    assert ("gates-lose" in codes) == (saved <= 0) == loses
