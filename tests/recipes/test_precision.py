"""What the blocks multiply in while they learn; everything that adds up stays float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pocketsize.errors import IntegrityError
from pocketsize.models import attention
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.recipes import training
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.gradual import Gradual
from pocketsize.recipes.qat import Qat
from pocketsize.recipes.training import Training
from recipes.test_teaching import context, losses, taught
from tiny import write_tiny

SHORT: dict[str, Any] = {"batch": 4, "length": 32, "rate": 1e-3, "tokens": 1024}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_tiny(tmp_path_factory.mktemp("tiny") / "m", "llama"))


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[torch.dtype]]]:
    """The dtypes that linears of blocks and of heads gave while a training ran."""
    seen: dict[str, set[torch.dtype]] = {"blocks": set(), "slopes": set(), "weights": set()}
    own = nn.Linear.forward

    def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        found = own(self, x)
        if found.requires_grad:
            seen["blocks"].add(found.dtype)
            seen["weights"].add(self.weight.dtype)
        return found

    as_trained = training.as_trained

    def noted(module: nn.Module, step: Training) -> nn.Module:
        for T in module.parameters():
            if T.requires_grad:
                T.register_post_accumulate_grad_hook(lambda T: seen["slopes"].add(T.grad.dtype))
        return as_trained(module, step)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", forward)
        patch.setattr(training, "as_trained", noted)
        yield seen


@pytest.mark.parametrize(
    "step",
    [
        Distill(**SHORT, precision="bf16"),
        Finetune(**SHORT, precision="bf16"),
        Gradual(**SHORT, sparsity=0.5, precision="bf16"),
    ],
    ids=lambda step: step.kind,
)
def test_blocks_multiply_in_bf16_and_all_that_is_kept_is_float32(
    model: Model, step: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context(tmp_path, model)
    with watched(monkeypatch) as seen:
        done = step.resolve(model, ("folder",)).apply(model, ctx)
    assert seen["blocks"] == {torch.bfloat16}
    assert seen["weights"] == seen["slopes"] == {torch.float32}
    assert all(done.weight(name).dtype == torch.float32 for name in done.checkpoint.entries)


def test_bf16_learns_what_float32_does(model: Model, tmp_path: Path) -> None:
    student = Layers(keep=1).apply(model, context(tmp_path / "short", model))
    ways = {name: taught(tmp_path / name, student, model, precision=name)[1] for name in ("fp32", "bf16")}
    exact, rounded = losses(ways["fp32"]), losses(ways["bf16"])
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded[-1] < rounded[0]


@pytest.mark.parametrize("hardware", [torch.bfloat16, torch.float32])
def test_auto_is_bf16_where_the_hardware_multiplies_it(
    hardware: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "forward_dtype", lambda: hardware)
    steps = (Distill(), Finetune(), Gradual(sparsity=0.5), Qat(), Qat(codes=False))
    for step in (*steps, *(qat.rehearsal()[0] for qat in steps[-2:])):
        assert step.dtype == hardware
    (rounded, _), (exact, _) = (Qat(precision=name).rehearsal() for name in ("bf16", "fp32"))
    assert (rounded.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    assert Distill(precision="fp32").dtype == torch.float32
    assert Distill(precision="bf16").dtype == torch.bfloat16


def test_what_a_teacher_said_in_bf16_is_not_taken_for_what_it_says_in_float32(
    model: Model, tmp_path: Path
) -> None:
    student = Layers(keep=1).apply(model, context(tmp_path / "short", model))
    kept = {"signals": "top_k", "kept": 16, "cache": str(tmp_path / "kept")}
    taught(tmp_path / "a", student, model, precision="bf16", **kept)
    taught(tmp_path / "b", student, model, precision="bf16", **kept)
    with pytest.raises(IntegrityError, match=r"is now .fp32.; use precision: bf16"):
        taught(tmp_path / "c", student, model, precision="fp32", **kept)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_computed_again_is_what_was_computed(
    precision: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []
    own = attention.Attended.apply
    monkeypatch.setattr(attention.Attended, "apply", lambda *given: taken.append(True) or own(*given))
    student = Layers(keep=1).apply(model, context(tmp_path / "short", model))
    long = {"length": attention.LEARNING + 32, "precision": precision, "tokens": 2000}
    plain, again = (
        taught(tmp_path / f"{recompute}", student, model, recompute=recompute, **long)[1]
        for recompute in (False, True)
    )
    assert losses(plain) == losses(again) and len(losses(plain)) > 2
    assert taken  # a real training comes here
