"""First-order costs: those that torch's own backward pass through gates gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oracles.taylor import slice_cost_slow
from pocketsize.models import backward, batches, calls
from pocketsize.models.load import load
from pocketsize.models.surgery import writers_of
from pocketsize.models.taylor import block_costs, slice_costs
from tiny import VOCAB, write_tiny


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32, two windows a batch, and instead of what is drawn by chance the likeliest."""
    for module in (backward, calls):
        monkeypatch.setattr(module, "forward_dtype", lambda: torch.float32)
    monkeypatch.setattr(batches, "BATCH_TOKENS", 48)
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, VOCAB - 1, (4, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1::2, 17:] = False
    return ids, mask


@pytest.mark.parametrize("family", ["llama", "qwen2", "bert", "mpnet", "bert classifier", "mpnet classifier"])
def test_equals_gates_on_the_whole_module(family: str, tmp_path: Path) -> None:
    family, _, classifies = family.partition(" ")
    model = load(write_tiny(tmp_path / "m", family, classes=("a", "b", "c") if classifies else ()))
    heads, ffn = writers_of(model)
    path, groups = model.blocks[0], {group.names[0]: group.names for group in model.groups}
    reader = model.groups[0].names[0]
    watched = {f"{path}.{heads}": model.head_width, f"{path}.{ffn}": 1, f"{path}.{reader}": 1}
    found = slice_costs(model, *tokens(), watched, seed=3)
    for name, width in watched.items():
        names = [f"{path}.{one}" for one in groups[name.removeprefix(f"{path}.")]]
        wanted = slice_cost_slow(model, *tokens(), names, width, 3)
        torch.testing.assert_close(
            found[name].value(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-3, atol=1e-6
        )


def test_a_block_costs_what_its_writers_do_together(tmp_path: Path) -> None:
    """Zeroing a block's writers by a little changes the loss as its terms say."""
    model = load(write_tiny(tmp_path / "m", "llama"))
    costs = block_costs(model, *tokens())
    assert len(costs) == 2 and all(cost > 0 for cost in costs)
    heads, ffn = writers_of(model)
    path = model.blocks[1]
    both = slice_costs(model, *tokens(), {f"{path}.{heads}": 64, f"{path}.{ffn}": 128})
    parts = [float(one.value()[0]) for one in both.values()]
    assert abs(parts[0] - parts[1]) <= costs[1] <= sum(parts)


def test_what_nothing_reads_costs_nothing(tmp_path: Path) -> None:
    from dataclasses import replace

    model = load(write_tiny(tmp_path / "m", "llama"))
    name = "model.layers.0.mlp.down_proj.weight"
    W = model.weight(name).clone()
    W[:, 5] = 0
    found = slice_costs(replace(model, changed={name: W}), *tokens(), {name.removesuffix(".weight"): 1})
    value = found[name.removesuffix(".weight")].value()
    assert value[5] == 0 and (value[6:] > 0).all()
