"""Every example runs on a tiny model, says what it promises, and stays under 40 lines."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import pocketsize as ps
from pocketsize.api import Data
from pocketsize.cli.main import main
from pocketsize.exporting import table
from pocketsize.recipes.recipe import read_recipe
from pocketsize.recipes.record import read_record
from tiny import TEXT, write_tiny

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ["--sequences", "4", "--length", "32"]
LINES = 40
Run = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """No folder is read back in a fresh process: that has its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "reload_check", lambda model, folder: ("left out in these tests",))
        yield


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example as a script and gives what it printed."""

    def run(name: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:
    """A folder that a run has finished."""
    base = tmp_path_factory.mktemp("finished")
    model = write_tiny(base / "model", "llama")
    texts = Data(sequences=4, length=32, tokens=256, written=0)
    ps.run(model, [ps.Gptq(group=32)], out=base / "out", export=["folder"], data=texts)
    return base / "out"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two files to calibrate with and one to evaluate with."""
    for name, seed in (("a.md", 1), ("b.md", 2), ("held-out.txt", 3)):
        words = " ".join(TEXT).split()
        rolled = (words[i * seed % len(words)] for i in range(2000))
        (tmp_path / name).write_text(". ".join(" ".join(next(rolled) for _ in range(9)) for _ in range(99)))
    return tmp_path


def numbers(line: str) -> list[float]:
    return [float(word) for word in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?", line)]


def test_every_example_is_short_and_tested() -> None:
    tests = Path(__file__).read_text()
    for path in sorted(EXAMPLES.iterdir()):
        if path.name == "__pycache__":
            continue
        assert path.suffix in (".py", ".yaml"), path.name
        assert len(path.read_text().splitlines()) < LINES, f"{path.name}: an example has under {LINES} lines"
        assert f'"{path.name}"' in tests, f"{path.name}: no test runs it"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_examples_explain_themselves(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and f"python examples/{path.name}" in shown


def test_own_text(example: Run, texts: Path) -> None:
    model, out = write_tiny(texts / "model", "llama"), texts / "out"
    chosen = ["--calibrate", texts / "*.md", "--evaluate", texts / "held-out.txt"]
    said = example("own_text.py", model, out, *chosen, *SHORT)
    record = read_record(out / "record.json")
    assert {text.role for text in record.texts} == {"calibrate", "evaluate"}
    assert all(str(texts) in text.name for text in record.texts)
    (kl,) = [m.value for m in record.measurements if m.name == "kl_mean"]
    (line,) = [line for line in said.splitlines() if line.startswith("kl_mean")]
    assert numbers(line)[0] == pytest.approx(kl, rel=1e-3) and kl > 0
    assert said.splitlines()[-1] == f"report: {out / 'report.html'}"


def test_to_a_goal(example: Run, tmp_path: Path) -> None:
    model, out = write_tiny(tmp_path / "model", "llama"), tmp_path / "out"
    said = example("to_a_goal.py", model, out, "--ratio", "3x", *SHORT)
    artifacts = {a.format: a for a in read_record(out / "record.json").artifacts}
    original = (model / "model.safetensors").stat().st_size
    assert artifacts["gguf"].bytes <= original / 3
    assert f"gguf: {artifacts['gguf'].bytes / 1e6:.2f} MB" in said and "read back: " in said
    assert said.startswith("chosen: gptq W")


def test_compare_methods(example: Run, tmp_path: Path) -> None:
    said = example("compare_methods.py", write_tiny(tmp_path / "m", "llama"), "--schemes", "W3A16", *SHORT)
    heading, rounded, calibrated = said.splitlines()
    assert heading.split() == ["scheme", "method", "KL", "top-1", "MB"]
    assert rounded.split()[1] == "rtn" and calibrated.split()[1] == "gptq"
    assert 0 < float(calibrated.split()[2]) < float(rounded.split()[2])


def test_layer_errors(example: Run, finished: Path) -> None:
    said = example("layer_errors.py", finished, "--top", "5").splitlines()
    layers = {
        layer.name: layer for step in read_record(finished / "record.json").steps for layer in step.layers
    }
    assert f"{len(layers)} matrices" in said[0] and len(said) == 2 + 5
    errors = [float(line.split()[0]) for line in said[2:]]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(max(layer.error for layer in layers.values()), rel=1e-2)
    assert all(line.split()[-1] in layers for line in said[2:])


def test_gram_matrices(example: Run, tmp_path: Path) -> None:
    said = example("gram_matrices.py", write_tiny(tmp_path / "m", "llama"), *SHORT).splitlines()
    assert len(said) == 2 * 4, "two blocks of four sites"
    assert "model.layers.0.self_attn.q_proj.weight, model.layers.0.self_attn.k_proj.weight" in said[0]
    for line in said:
        rank, columns, top = numbers(line)[:3]
        assert 1 <= rank <= columns and columns in (64, 128) and 0 < top <= 100


def test_encoder(example: Run, texts: Path) -> None:
    model = write_tiny(texts / "m", "bert")
    chosen = ["--schemes", "W8A16", "W2A16", "--evaluate", texts / "held-out.txt"]
    heading, wide, narrow = example("encoder.py", model, *chosen, *SHORT).splitlines()
    assert heading.split()[-2:] == ["Spearman", "MB"]
    (near, rank, size), (far, worse, smaller) = (map(float, row.split()[1:]) for row in (wide, narrow))
    assert near < far and rank > worse and size > smaller


def test_in_transformers(example: Run, finished: Path) -> None:
    pytest.importorskip("compressed_tensors")
    said = example("in_transformers.py", finished, "--prompt", "The quick", "--tokens", "4")
    assert said.startswith("The quick") and len(said.strip()) > len("The quick")


def test_recipe(tmp_path: Path) -> None:
    shown = EXAMPLES / "recipe.yaml"
    recipe = read_recipe(shown)
    assert recipe.export == ("gguf", "folder") and recipe.data.written_windows == 32
    tiny = yaml.safe_load(shown.read_text()) | {"model": str(write_tiny(tmp_path / "m", "llama"))}
    tiny["data"] |= {"sequences": 4, "length": 32, "tokens": 256}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny))
    assert main(["run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")]) == 0
    assert {a.format for a in read_record(tmp_path / "out" / "record.json").artifacts} == {"gguf", "folder"}
