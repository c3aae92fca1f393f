"""Whole runs on tiny models: what is written, what a killed run leaves, what bad input does."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from gguf import GGUFReader

import pocketsize as ps
from pocketsize.cli.main import main
from pocketsize.recipes.qat import Qat
from pocketsize.recipes.record import read_record
from tiny import write_texts, write_tiny

# Runs a recipe and kills the process with SIGKILL at the n-th call of a function.
KILLER = """
import importlib, os, signal, sys
module, _, name = sys.argv[1].rpartition(".")
count = int(sys.argv[2])
from pocketsize.cli.main import main
owner = importlib.import_module(module)
real = getattr(owner, name)
def wrapped(*args, **kwargs):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, name, wrapped)
sys.exit(main(sys.argv[3:]))
"""
POINTS = [
    ("pocketsize.recipes.journal.append", 1),  # the second block is quantized, its line not written
    ("pocketsize.recipes.journal.write_safetensors", 1),  # before the second block's object
    ("pocketsize.recipes.run.quality_of", 0),  # all quantized, nothing measured
    ("pocketsize.recipes.run.behaviours", 0),  # exported into the hidden folder, not recorded
    ("pocketsize.recipes.run.write_manifest", 0),  # everything but the manifest
]


def recipe(folder: Path, family: str = "llama", **changes: object) -> Path:
    write_tiny(folder / "model", family)
    export = ["gguf", "folder"] if family == "llama" else ["folder"]
    raw = {
        "model": "model",
        "data": {"sequences": 4, "length": 64, "tokens": 256},
        "steps": [{"gptq": {"scheme": "W4A16"}}],
        "export": export,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw | changes))
    return path


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


TIMED = {"record.json", "report.html", "README.md", "MANIFEST.json"}


@pytest.mark.parametrize(
    ("step", "points", "resumed"),
    [({"gptq": {"scheme": "W4A16"}}, POINTS, 3), ("awq", POINTS[:1], 1)],
    ids=str,
)
def test_killed_at_five_points_a_run_ends_with_the_same_bytes(
    step: object, points: list[tuple[str, int]], resumed: int, tmp_path: Path, source_env: dict[str, str]
) -> None:
    path = recipe(tmp_path, steps=[step])

    def run(out: str, *killer: str) -> subprocess.CompletedProcess[bytes]:
        args = ["run", str(path), "-o", str(tmp_path / out)]
        start = ["-c", KILLER, *killer] if killer else ["-m", "pocketsize.cli.main"]
        return subprocess.run(
            [sys.executable, *start, *args], env=source_env, capture_output=True, check=False
        )

    whole = run("whole")
    assert whole.returncode == 0, whole.stderr.decode()
    for name, count in points:
        killed = run("killed", name, str(count))
        assert killed.returncode == -signal.SIGKILL, (name, killed.stderr.decode())
        assert not (tmp_path / "killed").exists()
    assert run("killed").returncode == 0
    a, b = hashes(tmp_path / "whole"), hashes(tmp_path / "killed")
    assert a.keys() == b.keys()
    assert {n: h for n, h in a.items() if n not in TIMED} == {n: h for n, h in b.items() if n not in TIMED}
    first, second = (json.loads((tmp_path / n / "record.json").read_text()) for n in ("whole", "killed"))
    assert first.pop("timing")["resumed"] == 0 and second.pop("timing")["resumed"] == resumed
    assert first == second
    calibrate = [t for t in first["texts"] if t["role"] == "calibrate"]
    assert [t["windows"] for t in calibrate] == [2, 2] and "model itself" in calibrate[1]["name"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "model", "recipe.yaml", "whole"]


def test_checkpoints_of_other_tools_lie_in_one_output(tmp_path: Path) -> None:
    path = recipe(tmp_path, export=["gptq", "awq", "gguf"], steps=[{"rtn": {"scheme": "W4A16"}}])
    out = tmp_path / "out"
    assert main(["run", str(path), "-o", str(out)]) == 0
    record = read_record(out / "record.json")
    assert [(a.format, a.path) for a in record.artifacts[:2]] == [("gptq", "."), ("awq", "awq")]
    assert record.artifacts[2].path.endswith("Q4_0.gguf")
    differs = [f.message for f in record.findings if f.code == "folder-differs"]
    assert [said.split("; ")[1] for said in differs] == [
        f"the {form} folder keeps them in bf16" for form in ("gptq", "awq")
    ]
    assert {part.artifact for part in record.sizes} == {a.path for a in record.artifacts}
    card = (out / "README.md").read_text()
    assert 'GPTQModel.load(".")' in card and 'from_pretrained("awq", dtype="auto")' in card
    assert "- gptq" in card and "- awq" in card
    assert main(["verify", str(out)]) == 0 and main(["inspect", str(out / "awq")]) == 0
    again = ps.load(out / "awq")
    assert again.origin.dequantized_from == "awq 4 bits group 32"


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_encoders_run_whole(family: str, tmp_path: Path) -> None:
    assert main(["run", str(recipe(tmp_path, family)), "-o", str(tmp_path / "out")]) == 0
    record = read_record(tmp_path / "out" / "record.json")
    names = {m.name for m in record.measurements}
    assert record.task == "embed" and {"one_minus_cosine", "spearman"} <= names
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_json_gives_the_record_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(recipe(tmp_path)), "-o", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["record"]["schema"] == 1 and captured.err == ""


def test_a_changed_recipe_does_not_take_up_an_unfinished_run(
    tmp_path: Path, source_env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path)
    args = [sys.executable, "-c", KILLER, "pocketsize.recipes.run.quality_of", "0", "run", str(path)]
    subprocess.run([*args, "-o", str(tmp_path / "out")], env=source_env, capture_output=True, check=False)
    recipe(tmp_path, steps=[{"gptq": {"scheme": "W8A16"}}])
    assert main(["run", str(path), "-o", str(tmp_path / "out")]) == 7
    assert "recipe.steps.0.gptq.scheme was 'W4A16' and is now 'W8A16'" in capsys.readouterr().err


BAD = {
    "empty text": ({"data": {"calibrate": "empty.txt"}}, 3, "empty.txt"),
    "binary text": ({"data": {"calibrate": "binary.txt"}}, 3, "binary.txt"),
    "no such text": ({"data": {"evaluate": "absent-*.txt"}}, 3, "absent-*.txt"),
    "unknown key": ({"stpes": []}, 2, "did you mean 'steps'"),
    "unknown option": ({"steps": [{"gptq": {"gruop": 3}}]}, 2, "did you mean 'group'"),
    "no such model": ({"model": "nowhere"}, 2, "nowhere"),
    "3 bits in gguf": ({"steps": [{"gptq": {"scheme": "W3A16"}}]}, 4, "3-bit"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_and_changes_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, code, word = BAD[case]
    path = recipe(tmp_path, **changes)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 8)
    before = hashes(tmp_path)
    assert main(["run", str(path), "-o", str(tmp_path / "out")]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and word in error
    assert hashes(tmp_path) == before


def test_an_output_that_holds_something_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    before = hashes(tmp_path)
    assert main(["run", str(path), "-o", str(tmp_path / "out")]) == 2
    assert "not an empty folder" in capsys.readouterr().err and hashes(tmp_path) == before


def test_an_output_that_is_the_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path)
    before = hashes(tmp_path)
    assert main(["run", str(path), "-o", str(tmp_path / "model")]) == 2
    assert "choose another output" in capsys.readouterr().err and hashes(tmp_path) == before


def test_an_output_that_cannot_be_written_is_said_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path)
    (tmp_path / "file").write_text("x")
    targets = [tmp_path / "file" / "out"]
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        targets.append(tmp_path / "locked" / "out")
    before = hashes(tmp_path)
    for out in targets:
        assert main(["run", str(path), "-o", str(out)]) == 5
        assert str(out.parent) in capsys.readouterr().err
    assert hashes(tmp_path) == before


def test_a_size_below_the_possible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(tmp_path / "model", "llama")
    before = hashes(tmp_path)
    assert main(["shrink", str(tmp_path / "model"), "--fit", "1kB", "-o", str(tmp_path / "out")]) == 5
    error = capsys.readouterr().err
    assert "smallest gguf file possible" in error and error.count("\n") == 1 and hashes(tmp_path) == before


def test_an_original_without_room_in_memory_is_not_timed_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, "bert")
    monkeypatch.setattr("pocketsize.measurement.suite.available_bytes", lambda: 1000)
    assert main(["run", str(path), "-o", str(tmp_path / "out")]) == 0
    made = read_record(tmp_path / "out" / "record.json")
    assert [finding.code for finding in made.timing.findings].count("not-timed") == 1
    assert not made.timing.measurements
    assert "the original was not timed in torch" in " ".join(capsys.readouterr().out.split())


def test_quantize_from_python_reads_the_texts_it_is_given(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", "llama")
    for name in "ab":
        text = "".join(f"{name} text number {i} is about {i * i}\n" for i in range(300))
        (tmp_path / f"{name}.txt").write_text(text)
    texts = ps.Data(
        calibrate=(str(tmp_path / "a.txt"),),
        evaluate=(str(tmp_path / "b.txt"),),
        sequences=3,
        length=32,
        tokens=64,
    )
    done = ps.quantize(
        tmp_path / "model", out=tmp_path / "out", scheme="W8A16", data=texts, export=["folder"]
    )
    assert done.record.texts and "a.txt" in str(done.record.texts) and "b.txt" in str(done.record.texts)
    assert ps.result(tmp_path / "out").record.to_json() == done.record.to_json()


@pytest.mark.parametrize(("downloaded", "said"), [(10**9, 0), (1, 1)])
def test_an_output_no_smaller_than_the_download_says_so(downloaded: int, said: int, tmp_path: Path) -> None:
    path = recipe(tmp_path, "bert")
    (tmp_path / "model" / "origin.json").write_text(json.dumps({"source_bytes": downloaded}))
    assert main(["run", str(path), "-o", str(tmp_path / "out")]) == 0
    made = read_record(tmp_path / "out" / "record.json")
    assert [finding.code for finding in made.findings].count("no-smaller") == said


@pytest.mark.parametrize("step", [{"hqq": {"scheme": "W5A16"}}, {"gptq": {"symmetric": False}}], ids=str)
def test_float_zeros_reach_a_gguf_that_is_read_back(step: dict[str, object], tmp_path: Path) -> None:
    path = recipe(tmp_path, steps=[step], export=["gguf"])
    assert main(["run", str(path), "-o", str(tmp_path / "out")]) == 0
    record = read_record(tmp_path / "out" / "record.json")
    (options,) = (report.options for report in record.steps)
    assert options["float_zeros"] is True and options["symmetric"] is False
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_awq_changes_norms_and_what_is_written_is_read_back(tmp_path: Path) -> None:
    text = {"length": 64, "tokens": 256}
    path = recipe(tmp_path, steps=[{"awq": {"group": 32}}], data=text | {"sequences": 8})
    assert main(["run", str(path), "-o", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    (tmp_path / "few").mkdir()
    few = recipe(tmp_path / "few", steps=["awq"], data=text | {"sequences": 3})
    assert main(["run", str(few), "-o", str(tmp_path / "less")]) == 0
    codes = {f.code for f in read_record(tmp_path / "less" / "record.json").findings}
    assert "few-windows" in codes


@pytest.mark.parametrize(("family", "step"), [("llama", "smoothquant"), ("bert", {"rtn": {"scheme": "FP8"}})])
def test_rounded_inputs_are_measured_written_and_read_back(
    family: str, step: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"length": 64, "tokens": 256, "sequences": 8}
    path = recipe(tmp_path, family, steps=[step], data=data, export=["folder"])
    assert main(["run", str(path), "-o", str(tmp_path / "out")]) == 0
    record = read_record(tmp_path / "out" / "record.json")
    assert "14 linears" in record.protocol[-1] or "12 linears" in record.protocol[-1]
    assert "round each token that they read" in record.protocol[-1]
    assert "within 0 of their range" in record.artifacts[0].checks[0]
    assert main(["verify", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    against = ["--against", str(tmp_path / "model"), "--tokens", "256", "--json"]
    assert main(["measure", str(tmp_path / "out"), *against]) == 0
    assert "round each token that they read" in json.loads(capsys.readouterr().out)["protocol"][-1]


@pytest.mark.parametrize("kind", ["gptq", "awq", "rtn", "hqq"])
def test_overrides_are_what_is_written(kind: str, tmp_path: Path) -> None:
    overrides = {"*.down_proj": {"scheme": "W5A16"}, "model.layers.0.self_attn.v_proj": None}
    path = recipe(tmp_path, steps=[{kind: {"overrides": overrides}}], export=["gguf"])
    assert main(["run", str(path), "-o", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").glob("*.gguf")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}
    few, many = ("Q4_1", "Q5_1") if kind == "hqq" else ("Q4_0", "Q5_0")
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.1.ffn_down.weight"] == many
    assert kinds["blk.1.attn_v.weight"] == few and kinds["blk.0.attn_v.weight"] == "F16"
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_folder_with_overrides_loads_in_stock_transformers(tmp_path: Path) -> None:
    overrides = {"*.down_proj": {"scheme": "W8A16"}, "model.layers.0.self_attn.v_proj": None}
    path = recipe(tmp_path, steps=[{"gptq": {"overrides": overrides}}], export=["folder"])
    assert main(["run", str(path), "-o", str(tmp_path / "out")]) == 0
    record = read_record(tmp_path / "out" / "record.json")
    bits = {layer.name: layer.bits for step in record.steps for layer in step.layers}
    assert bits["model.layers.1.mlp.down_proj.weight"] == 8 and bits["model.layers.1.mlp.up_proj.weight"] == 4
    assert "model.layers.0.self_attn.v_proj.weight" not in bits


def test_a_folder_refuses_float_zeros_before_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, steps=[{"hqq": {"float_zeros": True}}], export=["gguf", "folder"])
    assert main(["run", str(path), "-o", str(tmp_path / "out")]) == 4
    said = capsys.readouterr().err
    assert "folder cannot store float zeros" in said and "export gguf alone" in said
    assert not (tmp_path / "out").exists()


def test_a_width_that_gguf_lacks_makes_a_folder_and_nothing_in_the_record_says_where_the_model_lay(
    tmp_path: Path,
) -> None:
    write_tiny(tmp_path / "model", "llama")
    data = ps.Data(sequences=4, length=64, tokens=256)
    given = {"method": "rtn", "scheme": "W3A16", "data": data}
    done = ps.quantize(tmp_path / "model", out=tmp_path / "out", **given)
    assert [artifact.format for artifact in done.record.artifacts] == ["folder"]
    assert "_name_or_path" not in (tmp_path / "out" / "record.json").read_text()


def test_what_the_model_writes_calibrates_and_teaches(tmp_path: Path) -> None:
    """The record tells of it in both parts, and what a training read is half of it."""
    write_tiny(tmp_path / "model", "llama")
    calibrate, evaluate = write_texts(tmp_path)
    texts = ps.Data((calibrate,), (evaluate,), sequences=8, length=32, tokens=64, written=0.5)
    step: dict[str, Any] = {"scheme": "W4A16", "group": 32, "embeddings": "same", "codes": False}
    step |= {"tokens": 640, "batch": 2, "length": 32}
    recipe = ps.Recipe(str(tmp_path / "model"), (Qat(**step),), data=texts)
    done = ps.run(recipe, out=tmp_path / "out")
    own = [(t.role, t.windows) for t in done.record.texts if t.name == "written by the model itself"]
    assert own == [("calibrate", 4), ("train", 18)]
    (report,) = done.record.steps
    assert report.training is not None and report.training.steps == 10


@pytest.mark.parametrize("left", [("lm_head",), ("lm_head.weight", "model.embed_tokens")])
@pytest.mark.parametrize("kind", ["gptq", "rtn"])
def test_embedding_and_head_may_be_left(kind: str, left: tuple[str, ...], tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", "llama", tied=False)
    path = recipe(tmp_path, steps=[{kind: {"overrides": dict.fromkeys(left)}}], export=["gguf"])
    write_tiny(tmp_path / "model", "llama", tied=False)
    found = ps.plan(str(path))
    assert {one.role for one in found.unquantized if "override" in one.why} == (
        {"head"} if len(left) == 1 else {"head", "embedding"}
    )
    assert main(["run", str(path), "-o", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").glob("*.gguf")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}
    assert kinds["output.weight"] == "F16" and kinds["blk.0.attn_v.weight"].startswith("Q")
    assert kinds["token_embd.weight"] == ("Q8_0" if len(left) == 1 else "F16")
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_the_output_of_another_run_is_left_and_what_differs_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["run", str(recipe(tmp_path, steps=["rtn"], export=["folder"])), "-o", str(out)]) == 0
    before, other = hashes(out), recipe(tmp_path, steps=[{"rtn": {"scheme": "W8A16"}}], export=["folder"])
    capsys.readouterr()
    assert main(["run", str(other), "-o", str(out)]) == 2
    said = capsys.readouterr().err
    assert "holds the output of another run: recipe.steps.0.rtn.scheme was 'W4A16' and is now 'W8A16'" in said
    assert "--overwrite" in said and hashes(out) == before
