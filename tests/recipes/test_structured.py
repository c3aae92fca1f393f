"""Blocks and slices that go, what is left solved anew, and that stock transformers loads what comes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketsize as ps
from pocketsize.errors import PocketsizeError, UnsupportedError, UsageError
from pocketsize.exporting import table
from pocketsize.io.checkpoint import open_checkpoint
from pocketsize.models.load import load
from pocketsize.models.shares import block_parameters
from pocketsize.models.surgery import sizes_of
from pocketsize.recipes.body import Layers, measured_windows
from pocketsize.recipes.heal import Healing
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.recipe import Data, Recipe
from pocketsize.recipes.record import Finding
from pocketsize.recipes.step import Context
from pocketsize.recipes.student import Student
from tiny import GENERATORS, write_texts, write_tiny

# What a user's own process does: no Pocketsize in it.
STOCK = """
import json, sys
import torch, transformers
for line in sys.stdin:
    folder, auto = json.loads(line)
    model, told = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    kinds = ("missing_keys", "unexpected_keys")
    left = {k: [n for n in told[k] if not n.startswith("pooler.")] for k in kinds}
    out = model(input_ids=torch.arange(3, 20)[None])[0]
    assert "pocketsize" not in sys.modules
    found = {"left": left, "mismatched": len(told["mismatched_keys"]), "finite": bool(out.isfinite().all())}
    print(json.dumps(found), flush=True)
"""


@pytest.fixture(scope="module")
def stock() -> Iterator[Callable[[Path, str], Any]]:
    """Has that process load a folder with one of the stock classes; it is started once."""
    command = [sys.executable, "-c", STOCK]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(folder: Path, auto: str) -> Any:
            process.stdin.write(json.dumps([str(folder), auto]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "reload_check", lambda *_: ())


class Quiet:
    def __init__(self, stop: str | None = None) -> None:
        self.stop = stop

    def phase(self, text: str) -> None: ...

    def progress(self, done: int, total: int, what: str) -> None:
        if self.stop is not None and self.stop in what:
            raise KeyboardInterrupt


def data(tmp_path: Path, sequences: int = 16) -> Data:
    calibrate, evaluate = write_texts(tmp_path)
    return Data((calibrate,), (evaluate,), sequences=sequences, length=32, tokens=256, written=0.0)


def ran(tmp_path: Path, source: Path, *steps: Any, out: str = "o", **options: Any) -> Any:
    console = options.pop("console", Quiet())
    given = options.pop("data", None) or data(tmp_path)
    return ps.run(
        source, list(steps), out=tmp_path / out, export=["folder"], data=given, console=console, dtype="fp32"
    )


# What nothing in the model could make up for.
UNHEALED = ("mixtral", "gemma2")
CASES: list[tuple[str, Any]] = [
    ("llama", Layers(remove=0.5)),
    ("llama", Layers(remove=0.5, pick="kl")),
    ("mpnet", Layers(remove=0.5, pick="taylor")),
    ("gpt2", Layers(keep=1)),
    ("mixtral", Layers(keep=1)),
    ("gemma2", Layers(keep=1)),
    ("llama", Student(remove=0.25)),
    ("qwen3", Student(remove=0.5, importance="taylor")),
    ("qwen2", Student(heads=2, kv_heads=1, ffn=96, importance="kl")),
    ("bert", Student(remove=0.25, importance="taylor")),
    ("mpnet", Student(hidden=32, importance="kl")),
    ("llama", Student(ffn=64, hidden=32, vocabulary="corpus")),
    ("phi3", Student(remove=0.5, importance="taylor")),
    ("gpt2", Student(hidden=48, ffn=64)),
    ("opt", Student(hidden=48, importance="taylor")),
    ("gpt_neox", Student(remove=0.5, importance="kl")),
    ("gemma3_text", Student(heads=2, kv_heads=1, ffn=64, hidden=48)),
    ("qwen3_moe", Student(remove=0.25, importance="taylor")),
    ("mixtral", Student(heads=2, kv_heads=1, ffn=64)),
    ("electra", Student(remove=0.25)),
    ("mobilebert", Student(ffn=64, importance="taylor")),
]


@pytest.mark.parametrize("family,step", CASES, ids=lambda x: x if isinstance(x, str) else x.kind)
def test_a_process_without_pocketsize_loads_what_comes_of_it(
    family: str, step: Any, tmp_path: Path, stock: Callable[[Path, str], Any]
) -> None:
    source = write_tiny(tmp_path / "m", family)
    done = ran(tmp_path, source, step)
    settled = step.resolve(load(source), ("folder",))
    assert settled.heal is (step.kind == "student" or family not in UNHEALED)
    assert settled.heal is not any(f.code == "not-healed" for f in done.record.findings)
    auto = "AutoModelForCausalLM" if family in GENERATORS else "AutoModel"
    assert stock(tmp_path / "o", auto) == {
        "left": {"missing_keys": [], "unexpected_keys": []},
        "mismatched": 0,
        "finite": True,
    }
    ours = load(tmp_path / "o")  # config and tensors agree: loading checks both ways
    assert {n: e.shape for n, e in ours.checkpoint.entries.items() if "embed" not in n} == {
        n: e.shape for n, e in settled.outline(load(source)).checkpoint.entries.items() if "embed" not in n
    }
    stages = done.record.steps[0].stages
    assert [one.name for one in stages] == ([] if settled.heal is False else ["cut", "healed"])
    assert sum(one.kept for one in stages) == (1 if stages else 0)


def test_a_share_becomes_sizes_before_anything_runs(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    step = Student(remove=0.25).resolve(model, ("folder",))
    assert step.remove is None and step.resolve(model, ("folder",)) == step and step.heal is True
    sizes = sizes_of(step.outline(model))
    gone = 1 - block_parameters(model, sizes) / block_parameters(model, sizes_of(model))
    assert gone == pytest.approx(0.25, abs=0.011)
    layers = Layers(remove=0.5).resolve(model, ("folder",))
    assert layers.keep == 1 and layers.remove is None and layers.resolve(model, ("folder",)) == layers


def test_healed_weights_are_what_is_written_and_the_rest_is_as_it_was(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    ran(tmp_path, source, Student(ffn=64), out="healed")
    done = ran(tmp_path, source, Student(ffn=64, heal=False), out="cut")
    assert done.record.steps[0].stages == ()
    healed, cut = (open_checkpoint(tmp_path / name) for name in ("healed", "cut"))
    moved = {n for n in cut.entries if not torch.equal(cut.read(n), healed.read(n))}
    assert moved and all(n.endswith("_proj.weight") for n in moved)
    assert {n: e.shape for n, e in cut.entries.items()} == {n: e.shape for n, e in healed.entries.items()}


@pytest.mark.parametrize("step", [Layers(keep=(1,)), Student(ffn=64)], ids=["layers", "student"])
def test_a_run_killed_while_it_heals_ends_with_the_same_bytes(step: Any, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    ran(tmp_path, source, step, out="a")
    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path, source, step, out="b", console=Quiet("healed model.layers.0"))
    assert list((tmp_path / ".b.work" / "drafts").rglob("model.layers.0.safetensors"))
    ran(tmp_path, source, step, out="b")
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_healing_that_does_not_help_is_dropped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketsize.recipes import heal as healing

    apart = iter([0.1, 0.2])
    monkeypatch.setattr(healing, "divergence", lambda *_: next(apart))
    source = write_tiny(tmp_path / "m", "llama")
    done = ran(tmp_path, source, Layers(keep=1))
    assert [one.kept for one in done.record.steps[0].stages] == [True, False]
    assert any(f.code == "healing-dropped" for f in done.record.findings)
    own, before = open_checkpoint(tmp_path / "o"), open_checkpoint(source)
    assert all(torch.equal(own.read(n), before.read(n)) for n in own.entries)
    assert Healing().tensors == {}


def test_too_few_windows_are_said(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    done = ran(tmp_path, source, Layers(keep=1), data=data(tmp_path, sequences=3))
    assert any(f.code == "few-windows" and "nothing was healed" in f.message for f in done.record.findings)


def test_what_was_found_before_a_run_was_cut_off_is_said(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    ids = torch.randint(5, model.config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    found: list[list[str]] = []
    for _ in range(2):
        store = open_journal(tmp_path / "w", {"a": "1"})
        ctx = Context(
            ids, torch.ones_like(ids, dtype=torch.bool), store, lambda *_: None, [Finding("b", "c")]
        )
        Layers(keep=1).resolve(model, ("folder",)).apply(model, ctx)
        found.append([one.code for one in ctx.findings])
    assert found[0] == found[1] and found[0].count("few-windows") == 1


def test_a_cut_is_quantized_and_measured_like_any_model(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    done = ran(tmp_path, source, Layers(remove=0.5), Student(remove=0.25), ps.Rtn(group=None))
    assert done.record.steps[-1].layers
    assert {m.name for m in done.record.measurements} >= {"kl_mean", "perplexity"}


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (Layers, {"remove": 0.0}, "remove is a share between 0 and 1, got 0"),
    (Layers, {"remove": 1.0}, "remove is a share between 0 and 1, got 1"),
    (Layers, {"remove": 1.5}, "remove is a share between 0 and 1"),
    (Layers, {"remove": 0.5, "keep": 1}, "give only one of both"),
    (Layers, {"keep": 0}, "at least 1"),
    (Layers, {"keep": []}, "keep lists numbers of blocks"),
    (Layers, {"keep": 1, "pick": "tailor"}, "did you mean 'taylor'"),
    (Layers, {"keep": 1, "heal": "no"}, "heal is auto, true or false"),
    (Student, {"remove": 1}, "remove is a share between 0 and 1"),
    (Student, {"remove": 0.5, "ffn": 64}, "leave out it or ffn"),
    (Student, {"remove": 0.5, "family": "llama"}, "remove is for a student that is cut"),
    (Student, {"remove": 0.5, "importance": "activations"}, "did you mean 'activation'"),
    (Student, {"remove": 0.5, "heal": "yes"}, "heal is auto, true or false"),
    (Student, {"vocabulary": 300, "heal": True}, "no heads and no channels go"),
    (Student, {"family": "llama", "heal": True}, "heal is for a student that is cut"),
]


@pytest.mark.parametrize("step,options,why", REFUSED)
def test_options_that_make_no_sense(step: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        step(**options)


UNFIT: list[tuple[str, Any, str]] = [
    ("llama", Layers(remove=0.1), "0.1 of 2 blocks is none of them; use 0.5"),
    ("llama", Layers(remove=0.9), "0.9 of 2 blocks is all of them"),
    ("gemma2", Layers(keep=1, heal=True), "layers: heal: norms stand behind what a block of a gemma2 adds"),
    ("mixtral", Layers(keep=1, heal=True), "heal: experts, which add what a block of a mixtral does"),
    ("gemma3_text", Layers(keep=1, pick="taylor"), "pick: taylor: norms stand behind .* use pick: kl"),
    ("mobilebert", Student(heads=2), "heads: heads and channels of a mobilebert go through bottlenecks"),
    ("electra", Student(hidden=32), "hidden: 32 is as wide as the embedding of this electra"),
    ("gpt2", Student(heads=3, hidden=32), "attention of a gpt2 is as wide as the model"),
    ("gpt_neox", Student(heads=2, kv_heads=1), "in a gpt_neox every head has keys of its own"),
    ("llama", Student(heads=3), "3 heads cannot share 2 keys and values evenly"),
    ("llama", Student(remove=0.999), "leaves no channel in them"),
]


@pytest.mark.parametrize("family,step,why", UNFIT)
def test_what_a_model_cannot_have_is_refused_before_it_runs(
    family: str, step: Any, why: str, tmp_path: Path
) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    with pytest.raises(PocketsizeError, match=why):
        Recipe("m", (step,)).resolved(model)


def test_a_pruned_model_is_cut_before_it_is_pruned(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama")).with_sparsity({"structure": "2:4", "share": 0.5})
    with pytest.raises(UsageError, match="cut first, then prune"):
        Student(ffn=64).resolve(model, ("folder",))
    with pytest.raises(UnsupportedError, match="cut first, then prune"):
        Layers(keep=1, heal=True).resolve(model, ("folder",))
    assert Layers(keep=1).resolve(model, ("folder",)).heal is False


def test_blocks_without_information_are_no_trouble(tmp_path: Path) -> None:
    """A block that adds nothing, and inner channels that are dead, go first; all else is as it was."""
    folder = write_tiny(tmp_path / "m", "llama")
    model = load(folder)
    dead = {
        name: torch.zeros_like(model.weight(name))
        for name in model.linears_of("model.layers.0")
        if name.endswith(("o_proj.weight", "down_proj.weight"))
    }
    from tiny import write_weights

    tensors = {name: dead.get(name, model.weight(name)) for name in model.checkpoint.entries}
    write_weights(folder, tensors)
    for pick in ("influence", "kl", "taylor"):
        if pick == "influence":  # which keeps both ends of two blocks
            continue
        done = ran(tmp_path, folder, Layers(keep=1, pick=pick), out=pick)
        assert done.record.steps[0].options["kept"] == [1], pick
        found = {m.name: m.value for m in done.record.measurements}
        assert abs(found["kl_mean"]) < 1e-6
    done = ran(tmp_path, folder, Student(ffn=64), out="narrow")
    assert done.record.steps[0].stages


def test_a_plan_tells_their_memory_and_disk(tmp_path: Path) -> None:
    from pocketsize.recipes.plan import plan

    source = write_tiny(tmp_path / "m", "llama")
    recipe = Recipe(
        str(source), (Layers(keep=1), Student(remove=0.25)), ("folder",), data(tmp_path), dtype="fp32"
    )
    found = plan(recipe, tmp_path / "o", console=Quiet())
    assert {stage.name for stage in found.stages} >= {"layers", "student"}
    done = ran(tmp_path, source, *recipe.steps)
    assert found.exports[0].bytes == done.record.artifacts[0].bytes
    assert replace(recipe, dtype="fp32") == recipe


@pytest.mark.parametrize(("length", "rows"), [(512, 2), (2048, 1), (32, 16)])
def test_a_thousand_tokens_are_measured_but_few_windows(length: int, rows: int, tmp_path: Path) -> None:
    ids = torch.zeros(20, length, dtype=torch.int64)
    ctx = Context(ids, torch.ones_like(ids, dtype=torch.bool), open_journal(tmp_path, {}), lambda *_: None)
    found, mask = measured_windows(ctx)
    assert found.shape == mask.shape == (rows, length)
