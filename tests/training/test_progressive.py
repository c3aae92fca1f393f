"""Blocks that learn one after the other: which, from what, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pocketsize.models.depth import with_blocks
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.training.examples import of_rows
from pocketsize.training.features import Features, Weights
from pocketsize.training.objective import Losses, NextToken, Teacher
from pocketsize.training.progressive import Progressive, Stages
from tiny import write_tiny


def lesson(tmp_path: Path, family: str) -> tuple[Progressive, Model, nn.Module]:
    model = load(write_tiny(tmp_path / "m", family))
    other = load(write_tiny(tmp_path / "t", family, seed=3))
    student, teacher = (materialise(m) for m in (model, other))
    student.requires_grad_(True)
    whole = NextToken(student, Losses(), (Teacher(teacher),))
    return (
        Progressive(whole, student, Teacher(teacher), Features(model, other, Weights(hidden=1.0))),
        model,
        teacher,
    )


def test_stages_share_the_first_batches_from_the_input_side() -> None:
    stages = Stages(7, 3)
    assert [stages.block(n) for n in range(9)] == [0, 0, 0, 1, 1, 2, 2, None, None]
    examples = of_rows([np.arange(4)], 0, "numbers")
    batch = stages.over(lambda n: examples.batch([0]), lambda n: examples.batch([0]))
    assert batch(0).block == 0 and batch(8).block is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("block", [0, 1])
def test_one_block_learns_alone(family: str, block: int, tmp_path: Path) -> None:
    objective, model, teacher = lesson(tmp_path, family)
    ran: list[str] = []
    for name in (*model.blocks, model.arch.head or ""):
        for who in (objective.student, teacher):
            who.get_submodule(name.removesuffix(".weight")).register_forward_hook(
                lambda *_, name=name: ran.append(name)
            )
    examples = of_rows([np.arange(5, 13), np.arange(20, 26)], 2, "numbers")
    stages = Stages(2, 2).over(lambda n: examples.batch([0, 1]), lambda n: examples.batch([0, 1]))
    batch = stages(block)
    loss = objective.loss(batch)
    assert set(ran) <= set(model.blocks[: block + 1])
    loss.backward()
    own = model.blocks[block]
    for name, p in objective.student.named_parameters():
        inside = any(name.startswith(f"{b}.") for b in model.blocks)
        assert p.grad is None or name.startswith(f"{own}.") or (block == 0 and not inside), name
    assert any(p.grad is not None for p in objective.student.get_submodule(own).parameters())


def test_the_distance_is_that_of_hidden_states(tmp_path: Path) -> None:
    objective, _, teacher = lesson(tmp_path, "llama")
    examples = of_rows([np.arange(5, 13), np.arange(20, 26)], 2, "numbers")
    batch = Stages(2, 2).over(lambda n: examples.batch([0, 1]), lambda n: examples.batch([0, 1]))(1)
    with torch.no_grad():
        x, y = (
            m(input_ids=batch.ids, attention_mask=batch.mask.long(), output_hidden_states=True).hidden_states
            for m in (_without_norm(objective.student), _without_norm(teacher))
        )
    real = [(i, j) for i, j in batch.mask.nonzero().tolist()]
    apart = sum(float(((x[2] - y[2])[i, j] ** 2).sum()) for i, j in real)
    assert objective.loss(batch).item() == pytest.approx(
        apart / sum(float((y[2][i, j] ** 2).sum()) for i, j in real), rel=1e-4
    )


def _without_norm(module: nn.Module) -> nn.Module:
    module.model.norm = nn.Identity()  # type: ignore[union-attr]
    return module


def test_a_student_with_fewer_blocks_follows_the_mapped_ones(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    short = with_blocks(model, [0])
    objective = Progressive(
        NextToken(materialise(short), Losses()),
        materialise(short).requires_grad_(True),
        Teacher(materialise(model)),
        Features(short, model, Weights(hidden=1.0)),
    )
    examples = of_rows([np.arange(5, 13)], 2, "numbers")
    batch = Stages(1, 1).over(lambda n: examples.batch([0]), lambda n: examples.batch([0]))(0)
    assert objective.loss(batch).item() > 0
