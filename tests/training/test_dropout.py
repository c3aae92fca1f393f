"""What is dropped at random while a model learns, in every family and every step that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel

from pocketsize.errors import UsageError
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.recipes import training
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.gradual import Gradual
from pocketsize.training.dropout import set_dropout
from recipes.test_teaching import context
from tiny import FAMILIES, tiny_config, write_tiny
from tiny_configs import REFUSED

PLAIN = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout")
SHORT: dict[str, Any] = {"batch": 4, "length": 32, "rate": 1e-3, "tokens": 256}


@torch.no_grad()
def answers(module: nn.Module) -> list[torch.Tensor]:
    """What the module gives of the same tokens with three seeds."""
    ids = torch.arange(5, 21).view(1, -1)
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        found.append(module(ids).last_hidden_state)
    return found


def shares(module: nn.Module) -> set[float]:
    """All that is dropped anywhere, by layers and by numbers that are read while a module works."""
    found = {part.p for part in module.modules() if isinstance(part, nn.Dropout)}
    parts = [vars(part) for part in module.modules()]
    return found | {v for own in parts for n, v in own.items() if n.endswith("dropout") and n in PLAIN}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_a_config_that_drops_nothing_may_say_so_in_whole_numbers(family: str) -> None:
    config = tiny_config(family, tied=False)
    for name, value in config.to_dict().items():
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0)
    module = AutoModel.from_config(config).train()
    assert shares(module) == {0}
    set_dropout(module, 0.3)
    assert shares(module) == {0.3}
    found = answers(module)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("family", [*FAMILIES, *REFUSED])
def test_nothing_is_left_to_chance_without_dropout(family: str) -> None:
    config = tiny_config(family, tied=False)
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("drop" in name or "pdrop" in name):
            setattr(config, name, 0.4)
    module = AutoModel.from_config(config).train()
    chance = answers(module)
    assert not torch.equal(chance[0], chance[1])
    set_dropout(module, 0.0)
    still = answers(module)
    assert torch.equal(still[0], still[1])
    assert torch.equal(still[0], still[2])
    assert torch.equal(still[0], answers(module.eval())[0])
    set_dropout(module.train(), 0.3)
    again = answers(module)
    assert not torch.equal(again[0], again[1])
    assert shares(module) == {0.3}


def test_layers_that_are_dropped_whole_stay_as_they_are_unless_nothing_is_to_be_dropped() -> None:
    config = tiny_config("opt", tied=False)
    config.layerdrop = 0.25
    module: Any = AutoModel.from_config(config)
    set_dropout(module, 0.1)
    assert module.decoder.layerdrop == 0.25
    set_dropout(module, 0.0)
    assert module.decoder.layerdrop == 0.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny generator whose config drops a tenth."""
    found = load(write_tiny(tmp_path_factory.mktemp("tiny") / "m", "gpt2"))
    assert found.config.resid_pdrop == 0.1
    return found


@pytest.mark.parametrize(
    ("step", "share"),
    [
        (Distill(**SHORT), 0.1),
        (Distill(**SHORT, dropout=0.0), 0.0),
        (Distill(**SHORT, dropout=0.3), 0.3),
        (Finetune(**SHORT), 0.1),
        (Finetune(**SHORT, dropout=0), 0.0),
        (Gradual(**{**SHORT, "tokens": 1024}, sparsity=0.5), 0.1),
    ],
    ids=lambda given: given.kind if isinstance(given, training.Training) else str(given),
)
def test_a_step_drops_what_it_says(
    model: Model, step: training.Training, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[float]] = []
    own = training.as_trained

    def noted(module: nn.Module, step: training.Training) -> nn.Module:
        done = own(module, step)
        seen.append({part.p for part in module.modules() if isinstance(part, nn.Dropout)})
        return done

    monkeypatch.setattr(training, "as_trained", noted)
    step.resolve(model, ("folder",)).apply(model, context(tmp_path, model))
    assert seen == [{share}]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="dropout must be auto or from 0 to below 1"):
        Finetune(dropout=share)
