"""What callers of the Python API give: wrong kinds are named, in words of the API, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketsize as ps
from pocketsize.errors import UsageError
from tiny import write_texts, write_tiny

OUT = "o"
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "data": (lambda m: ps.quantize(m, out=OUT, data={"sequences": 4}), "data: a Data, such as"),
    "step as mapping": (
        lambda m: ps.run(m, [{"gptq": {}}], out=OUT),
        "steps: steps are objects such as Gptq",
    ),
    "one step": (lambda m: ps.run(m, ps.Gptq(), out=OUT), "steps: a list of steps"),
    "class": (lambda m: ps.run(m, [ps.Gptq], out=OUT), "steps: steps are objects"),
    "half a step": (lambda m: ps.run(m, [ps.Gptq(learn=1.5)], out=OUT), "gptq: learn is a whole number"),
    "layers": (lambda m: ps.distill(m, out=OUT, layers=2.0), "layers: how many blocks stay"),
    "fit": (lambda m: ps.shrink(m, out=OUT, fit=Path("x")), "fit: a number or text such as"),
    "keep": (lambda m: ps.plan(m, keep=True), "keep: a number or text such as"),
    "out": (lambda m: ps.run(m, [ps.Rtn()], out=None), "out: a folder, got None"),
    "folder": (lambda m: ps.verify(None), "folder: a folder, got None"),
    "model": (lambda m: ps.quantize(None, out=OUT), "model: a folder, a hub id, a sample"),
    "console": (lambda m: ps.run(m, [ps.Rtn()], out=OUT, console=print), "console: needs phase"),
    "method": (lambda m: ps.quantize(m, out=OUT, method="layers", keep=1), "method is rtn, hqq, awq"),
    "files": (lambda m: ps.Data(calibrate=5), "data: calibrate: files are named by text, got 5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_wrong_kind_of_thing_is_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, (call, said) = write_tiny(tmp_path / "m", "llama"), WRONG[case]
    with pytest.raises(UsageError, match=said):
        call(model)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("given", [{"export": ["gguf"]}, {"data": ps.Data()}, {"dtype": "fp32"}])
def test_what_a_recipe_says_itself_is_refused_beside_it(given: dict[str, Any], tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m", "llama")
    recipe = ps.Recipe(str(model), (ps.Rtn(),), ("folder",))
    with pytest.raises(UsageError, match=f"a recipe has {next(iter(given))} of its own"):
        ps.run(recipe, out=tmp_path / "o", **given)


def test_a_model_that_was_changed_is_not_its_folder(tmp_path: Path) -> None:
    model = ps.load(write_tiny(tmp_path / "m", "llama"))
    changed = model.with_quantized({}, {"model.norm.weight": torch.zeros(64)})
    with pytest.raises(UsageError, match=r"which has nothing of the change to model\.norm\.weight"):
        ps.quantize(changed, out=tmp_path / "o", method="rtn")
    assert ps.plan(model, [ps.Rtn(scheme="W8A16")], out=tmp_path / "o").exit_code == 0


def test_one_file_and_one_format_need_no_list(tmp_path: Path) -> None:
    model, (calibrate, evaluate) = write_tiny(tmp_path / "m", "llama"), write_texts(tmp_path)
    data = ps.Data(Path(calibrate), evaluate, sequences=4, length=32, tokens=64, written=0.0)
    assert data == ps.Data((calibrate,), (evaluate,), 4, 32, 64, written=0.0)
    found = ps.plan(model, [ps.Rtn()], out=tmp_path / "o", export="gguf", data=data)
    assert [export.format for export in found.exports] == ["gguf"]
