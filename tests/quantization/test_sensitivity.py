"""KL told from gradients: what a changed model really gives."""

from __future__ import annotations

import pytest
import torch

from pocketsize.exporting.behaviour import loaded
from pocketsize.models.backward import Ends, backward_walk
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.quantization.sensitivity import embedding_cost, head_cost, linear_cost
from tiny import VOCAB, write_tiny

LENGTH = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_tiny(tmp_path_factory.mktemp("sensitivity") / "m", "llama", tied=False))


def windows(count: int = 64) -> torch.Tensor:
    return torch.randint(5, VOCAB - 1, (count, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def measured(model: Model, name: str, change: torch.Tensor) -> float:
    """KL of the model with one changed parameter."""
    ids, module = windows(), loaded(model, model.original)
    before = module(ids).logits.log_softmax(-1).double()
    module.get_parameter(name).add_(change)
    after = module(ids).logits.log_softmax(-1).double()
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_every_matrix_costs_what_it_is_told_to(model: Model) -> None:
    """Within a factor of 2 each and 1.15 all together: draws scatter, and positions act together."""
    ids, ratios = windows(), []
    for _, seen in backward_walk(model, ids, torch.ones_like(ids, dtype=torch.bool), seed=1):
        if isinstance(seen, Ends):
            head, table = str(model.arch.head), model.arch.embedding
            W = model.original(head)
            change = noise(W, 7)
            ratios.append(head_cost(seen.hidden, W, change) / measured(model, head, change))
            change = noise(model.original(table), 8)
            told = embedding_cost(seen.tokens, seen.gradient, change)
            ratios.append(told / measured(model, table, change))
            continue
        for i, (name, one) in enumerate(seen.items()):
            change = noise(model.original(name), i)
            ratios.append(linear_cost(*one.joined(), change) / measured(model, name, change))
    assert len(ratios) == 16
    assert all(0.5 < ratio < 2 for ratio in ratios), ratios
    logs = torch.tensor(ratios).log().mean()
    assert abs(float(logs)) < torch.tensor(1.15).log()


def noise(W: torch.Tensor, seed: int) -> torch.Tensor:
    return 0.02 * W.std() * torch.randn(W.shape, generator=torch.Generator().manual_seed(seed))
