"""The options of `prune` as steps, and a run of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from pocketsize.cli import options
from pocketsize.cli.main import main
from pocketsize.errors import UsageError
from pocketsize.exporting import table
from tiny import write_texts, write_tiny

NOTHING: dict[str, Any] = dict.fromkeys(
    ("sparsity", "pattern", "score", "remove", "by", "recover", "scheme"), None
) | {"set_": ()}


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, [{"prune": {}}]),
        ({"sparsity": "60%"}, [{"prune": {"sparsity": 0.6}}]),
        ({"pattern": "2:4", "score": "wanda"}, [{"prune": {"pattern": "2:4", "score": "wanda"}}]),
        ({"set_": ("learn=20",)}, [{"prune": {"learn": 20}}]),
        ({"recover": "500k"}, [{"prune": {}}, {"distill": {"tokens": "500k"}}]),
        ({"scheme": "W4A16"}, [{"prune": {}}, {"gptq": {"scheme": "W4A16"}}]),
        ({"remove": "25%"}, [{"student": {"remove": 0.25, "importance": "taylor"}}]),
        ({"remove": "0.25", "by": "depth"}, [{"layers": {"remove": 0.25, "pick": "kl"}}]),
    ],
    ids=str,
)
def test_options_are_steps(given: dict[str, Any], steps: list[Any]) -> None:
    assert options.raw_prune(**(NOTHING | given)) == steps


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"by": "depth"}, "--remove"),
        ({"remove": "25%", "sparsity": "50%"}, "--sparsity"),
        ({"remove": "25%", "pattern": "2:4"}, "--pattern"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(click.UsageError, match=said):
        options.raw_prune(**(NOTHING | given))


def test_a_share_beyond_the_whole_is_refused() -> None:
    with pytest.raises(UsageError, match="sparsity is a share of at most"):
        options.raw_prune(**(NOTHING | {"sparsity": "150%"}))


def test_a_model_is_pruned_and_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "reload_check", lambda *_: ())
    write_tiny(tmp_path / "m", "llama")
    calibrate, evaluate = write_texts(tmp_path)
    words = ["prune", str(tmp_path / "m"), "--sparsity", "50%", "-o", str(tmp_path / "o"), "--json"]
    words += ["--calibrate", calibrate, "--evaluate", evaluate, "--sequences", "4", "--length", "32"]
    assert main([*words, "--tokens", "256", "--written", "0"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    formats = {a["format"] for a in told["record"]["artifacts"]}
    assert formats == {"folder", "sparse"}
    assert "dense-is-better" in {f["code"] for f in told["record"]["findings"]}
    assert "dropping as many of the smallest weights" in (tmp_path / "o" / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recover": "3parsecs"}, "--recover: tokens .500k, 2M., 3epochs or 30min, got '3parsecs'"),
        ({"sparsity": "50%", "set_": ("sparsity=0.6",)}, "--set sparsity=: --sparsity says that already"),
        ({"remove": "25%", "set_": ("remove=0.6",)}, "--set remove=: --remove says that already"),
        ({"set_": ("learn=1", "learn=2")}, "--set learn= is there twice"),
        ({"set_": ("learn=[1",)}, r"--set learn=\[1: '\[1' is no value of a recipe file"),
    ],
    ids=str,
)
def test_what_cannot_be_read_or_is_said_twice_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(click.UsageError, match=said):
        options.raw_prune(**(NOTHING | given))


def test_a_training_has_one_budget() -> None:
    nothing = {"layers": None, "pick": "even", "loss": None, "teacher": (), "budget": None, "set_": ()}
    assert options.raw_distill(**nothing) == [{"distill": {}}]
    assert options.raw_distill(**(nothing | {"budget": "3Epochs"})) == [{"distill": {"epochs": 3.0}}]
    for budget, said in (("2k", "tokens=5k"), ("3epochs", "minutes=1"), ("30min", "epochs=1")):
        with pytest.raises(click.UsageError, match="--budget says that already"):
            options.raw_distill(**(nothing | {"budget": budget, "set_": (said,)}))
        with pytest.raises(click.UsageError, match="--budget says that already"):
            options.raw_finetune(budget=budget, set_=(said,))
    with pytest.raises(click.UsageError, match="--loss says that already"):
        options.raw_distill(**(nothing | {"loss": "js", "set_": ("loss=js",)}))
