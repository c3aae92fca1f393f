"""Matrices that could not be quantized as asked are counted, and more than 1 % of them are an error."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pocketsize.errors import NumericalError
from pocketsize.linalg import Factor, feedback_factor
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.quantization import gptq as solving
from pocketsize.recipes import prune as pruning
from pocketsize.recipes.fallbacks import raised_damping, require_few_fallbacks
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.prune import Prune
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.record import LayerReport
from pocketsize.recipes.step import Context
from tiny import write_tiny


def context(tmp_path: Path, windows: int = 16) -> Context:
    ids = torch.randint(3, 320, (windows, 16), generator=torch.Generator().manual_seed(0))
    journal = open_journal(tmp_path / "work", {"recipe": "test"})
    return Context(ids, torch.ones_like(ids, dtype=torch.bool), journal, lambda *_: None)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load(write_tiny(tmp_path / "model", "llama"))


def reports(raised: int, total: int) -> list[LayerReport]:
    made = [LayerReport(f"layer.{i}", 8, 8, 4, 4.5, 0.1, 0.1) for i in range(total)]
    return [
        *(LayerReport(f"bad.{i}", 8, 8, 4, 4.5, 0.1, 0.1, 0.03, 1) for i in range(raised)),
        *made[raised:],
    ]


@pytest.mark.parametrize(("most", "total"), [(3, 14), (3, 300), (10, 1000), (21, 2100)])
def test_one_of_a_hundred_may_fall_back_and_three_of_a_small_model(most: int, total: int) -> None:
    require_few_fallbacks("gptq", reports(most, total), total)
    with pytest.raises(
        NumericalError, match=rf"gptq: the inputs of {most + 1} of {total} matrices.* up to 0\.03: bad\.0"
    ) as error:
        require_few_fallbacks("gptq", reports(most + 1, total), total)
    assert "damp: 0.03" in str(error.value) and error.value.exit_code == 6
    assert ("and" in str(error.value).partition("bad.4")[2].partition(";")[0]) is (most + 1 > 5)


def test_those_that_are_quantized_already_count_in_a_share_of_all() -> None:
    require_few_fallbacks("gptq", reports(4, 10), 400)


def stubborn(monkeypatch: pytest.MonkeyPatch, module: ModuleType, width: int) -> None:
    """Gram matrices of this width take more damping than is asked for."""

    def factor(H: Tensor, damp: float) -> Factor:
        found = feedback_factor(H, 3 * damp if len(H) == width else damp)
        return Factor(found.M, found.d, found.damp, int(len(H) == width))

    monkeypatch.setattr(module, "feedback_factor", factor)


STEPS = [(Gptq(), solving), (Prune(score="sparsegpt"), pruning), (Prune(score="surgeon"), pruning)]
IDS = ["gptq", "sparsegpt", "surgeon"]


@pytest.mark.parametrize(("step", "module"), STEPS, ids=IDS)
def test_a_few_are_told_once_and_name_the_most(
    step: Gptq | Prune, module: ModuleType, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubborn(monkeypatch, module, 128)
    ctx = context(tmp_path)
    step.resolve(model, ("folder",)).apply(model, ctx)
    raised = [layer.name for report in ctx.reports for layer in report.layers if layer.escalations]
    assert raised == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    (found,) = (f for f in ctx.findings if f.code == "damping-raised")
    assert found.message == "damping raised for 2 of 14 matrices, at most to 0.03" and found.where in raised


@pytest.mark.parametrize(("step", "module"), STEPS, ids=IDS)
def test_many_end_the_run_at_the_first_block_and_again_where_it_goes_on(
    step: Gptq | Prune, module: ModuleType, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubborn(monkeypatch, module, 64)
    step = step.resolve(model, ("folder",))
    names = r"model\.layers\.0\.self_attn\.q_proj.* and 1 more"
    hint = rf"{step.kind}: the inputs of 6 of 14 matrices.*: {names}; .*damp: 0\.03"
    for _ in range(2):
        with pytest.raises(NumericalError, match=hint):
            step.apply(model, context(tmp_path))


def test_what_no_damping_helps_names_its_linear(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = feedback_factor
    monkeypatch.setattr(solving, "feedback_factor", lambda H, damp: real(H - 9 * H.diagonal().mean(), damp))
    with pytest.raises(
        NumericalError, match=r"layers\.0\.self_attn\.q_proj\.weight: Gram matrix of 64 inputs"
    ):
        Gptq().resolve(model, ("folder",)).apply(model, context(tmp_path))


def test_inputs_that_are_infinite_inside_a_block_name_their_linear(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama")
    held = load_file(folder / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        held[f"model.layers.1.mlp.{name}.weight"][3] = 1e20
    held["model.layers.1.mlp.down_proj.weight"][:, 3] = 0
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    with pytest.raises(
        NumericalError, match=r"layers\.1\.mlp\.down_proj\.weight: 1 of its 128 inputs were NaN"
    ):
        Gptq().resolve(model, ("folder",)).apply(model, context(tmp_path))


def test_what_the_text_does_not_show_is_no_fallback() -> None:
    """Experts that no token reached are told by a finding of their own: no setting is at fault."""
    unseen = [LayerReport(f"expert.{i}", 8, 8, 4, 4.5, 0.1, 0.1, 0.01, 0, dead=8) for i in range(50)]
    require_few_fallbacks("gptq", unseen, 50)
    assert not list(raised_damping(unseen))
