"""Zeros that are made while a model is trained, and zeros that stay."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pocketsize.errors import Stopped
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.pruning.pattern import Pattern, pattern_of
from pocketsize.training.examples import Order, of_rows
from pocketsize.training.loop import Course, Pace, train
from pocketsize.training.masked import Held, Thinned, Thinning
from pocketsize.training.objective import Losses, NextToken
from tiny import write_tiny

EXAMPLES = of_rows([(np.arange(12) * (i + 3)) % 60 + 5 for i in range(16)], 0, "numbers")
HALF = Pattern(0.5)
STEPS = 12
PLANS = {
    "magnitude": Thinning(HALF, begin=0.1, end=0.6, every=2),
    "global": Thinning(HALF, scope="model", begin=0.1, end=0.6, every=2),
    "erk": Thinning(HALF, scope="erk", begin=0.1, end=0.6, every=2),
    "2:4": Thinning(pattern_of("2:4", 0.5), begin=0.1, end=0.6, every=2),
    "cycles": Thinning(HALF, cycles=3, begin=0.0, end=0.6),
    "rewind": Thinning(HALF, cycles=2, rewind=True, begin=0.0, end=0.6),
    "movement": Thinning(HALF, method="movement", begin=0.1, end=0.6, every=2),
    "movement 2:4": Thinning(pattern_of("2:4", 0.5), method="movement", begin=0.1, end=0.6, every=2),
    "soft": Thinning(HALF, method="soft_movement", scope="model", begin=0.1, end=0.6, every=2, rate=0.5),
    "rigl": Thinning(HALF, method="rigl", begin=0.1, end=0.6, every=2),
    "rigl 2:4": Thinning(pattern_of("2:4", 0.5), method="rigl", begin=0.1, end=0.6, every=2),
    "late": Thinning(HALF, begin=0.5, end=1.0, every=1),
}


@dataclass
class Keeper:
    """Checkpoints in memory; a stop comes once so many steps are done."""

    stop_at: int = 10**9
    kept: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    step: int = 0

    def last(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
        return copy.deepcopy(self.kept)

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.kept = copy.deepcopy((dict(tensors), dict(facts)))

    @property
    def stopping(self) -> bool:
        self.step += 1
        return self.step >= self.stop_at

    def safe_point(self, where: str) -> None:
        if self.step >= self.stop_at:
            raise Stopped(where)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("tiny")
    return {family: load(write_tiny(folder / family, family)) for family in ("llama", "gpt2")}


def taught(
    model: Model, plan: Thinning, keeper: Keeper | None = None, **options: Any
) -> tuple[nn.Module, Course, Thinned]:
    module = materialise(model).requires_grad_(True).train()
    shaping = Thinned(module, model, plan)
    objective = NextToken(module, Losses(soft=0.0, hard=1.0))
    pace = Pace(steps=STEPS, peak=1e-3, **options)
    batches = Order(EXAMPLES, 4, seed=0).batch
    return module, train(module, objective, batches, pace, keeper or Keeper(), shaping=shaping), shaping


def linears(module: nn.Module, model: Model) -> dict[str, Tensor]:
    return {name: module.get_parameter(name).detach() for name in model.linears}


def whole(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for _, p in sorted(module.named_parameters())])


@pytest.mark.parametrize(
    ("family", "name"), [*(("llama", name) for name in PLANS), *(("gpt2", n) for n in PLANS if "2:4" in n)]
)
def test_exactly_the_share_that_was_asked_for_is_zero(
    family: str, name: str, models: dict[str, Model]
) -> None:
    model, plan = models[family], PLANS[name]
    start = materialise(model)
    module, course, _ = taught(model, plan)
    found = linears(module, model)
    zeros = {n: int((W == 0).sum()) for n, W in found.items()}
    total = sum(W.numel() for W in found.values())
    if plan.scope == "matrix":
        assert all(zeros[n] == W.numel() // 2 for n, W in found.items())
    assert abs(sum(zeros.values()) - total / 2) <= (2 if plan.scope == "erk" else 0)
    if plan.pattern.of:
        rows = [W.T if model.arch.is_transposed(n) else W for n, W in found.items()]
        assert all(bool(((W != 0).reshape(-1, 4).sum(1) == 2).all()) for W in rows)
    assert course.pruned[-1][1] == sum(zeros.values()) / total
    shares = [share for _, share in course.pruned]
    assert plan.method in ("rigl", "soft_movement") or shares == sorted(shares)
    # Nothing is left of what made the zeros, and all else learned and has none.
    assert {n for n, _ in module.named_parameters()} == {n for n, _ in start.named_parameters()}
    for n in model.ends:
        other = module.get_parameter(n)
        assert not torch.equal(other, start.get_parameter(n)) and bool((other != 0).all())


@pytest.mark.parametrize("name", PLANS)
def test_a_training_cut_off_after_any_step_ends_with_the_same_weights(
    name: str, models: dict[str, Model]
) -> None:
    model, plan = models["llama"], PLANS[name]
    module, course, _ = taught(model, plan)
    for cut in (2, 7, 8):
        keeper = Keeper(stop_at=cut)
        with pytest.raises(Stopped):
            taught(model, plan, keeper)
        keeper.stop_at = 10**9
        again, other, _ = taught(model, plan, keeper)
        assert torch.equal(whole(again), whole(module)), cut
        assert (other.pruned, other.losses) == (course.pruned, course.losses)


@pytest.mark.parametrize("name", ["magnitude", "movement", "rigl"])
def test_the_average_of_weights_has_the_zeros_too(name: str, models: dict[str, Model]) -> None:
    model = models["llama"]
    module, _, _ = taught(model, PLANS[name], average=0.8)
    assert all(int((W == 0).sum()) == W.numel() // 2 for W in linears(module, model).values())


def test_a_ramp_rises_along_its_cubic(models: dict[str, Model]) -> None:
    model, plan = models["llama"], Thinning(Pattern(0.9), begin=0.0, end=1.0, every=1)
    _, course, _ = taught(model, plan)
    total = sum(model.matrix_shape(n)[0] * model.matrix_shape(n)[1] for n in model.linears)
    for step, share in course.pruned:
        want = 0.9 - 0.9 * (1 - step / STEPS) ** 3
        assert share == pytest.approx(want, abs=len(model.linears) / total)


@pytest.mark.parametrize(
    "plan",
    [PLANS["magnitude"], replace(PLANS["movement"], scores="magnitude", rate=1e-12)],
    ids=lambda plan: plan.method,
)
def test_what_becomes_zero_by_magnitude_is_the_smallest(plan: Thinning, models: dict[str, Model]) -> None:
    """With no training to speak of, it is what one cut of the original leaves."""
    model = models["llama"]
    module = materialise(model).requires_grad_(True).train()
    shaping = Thinned(module, model, plan)
    pace = Pace(steps=STEPS, peak=1e-12, decay=0.0)
    objective = NextToken(module, Losses(soft=0.0, hard=1.0))
    train(module, objective, Order(EXAMPLES, 4, seed=0).batch, pace, Keeper(), shaping=shaping)
    for name, W in linears(module, model).items():
        before = model.matrix(name).abs()
        assert torch.equal(W != 0, before > before.flatten().kthvalue(before.numel() // 2).values)


def test_rigl_lets_weights_change_places_and_starts_new_ones_at_zero(models: dict[str, Model]) -> None:
    model = models["llama"]
    first, then = list[dict[str, Tensor]](), list[dict[str, Tensor]]()

    class Watched(Thinned):
        def updated(self, step: int, done: float, moments: Any) -> float | None:
            before = {m.name: m.mask.clone() for m in self.matrices}
            made = int(self.state[0])
            found = super().updated(step, done, moments)
            if found is not None and made == 1:
                first.append(before)
                then.append({m.name: m.mask.clone() for m in self.matrices})
                for m in self.matrices:
                    new = m.mask & ~before[m.name]
                    assert new.any() and bool((m.W[new] == 0).all())
                    assert all(bool((moments[m.W][k][new] == 0).all()) for k in ("exp_avg", "exp_avg_sq"))
            return found

    module = materialise(model).requires_grad_(True).train()
    shaping = Watched(module, model, PLANS["rigl"])
    objective = NextToken(module, Losses(soft=0.0, hard=1.0))
    pace = Pace(steps=STEPS, peak=1e-3)
    train(module, objective, Order(EXAMPLES, 4, seed=0).batch, pace, Keeper(), shaping=shaping)
    assert len(first) == 1 and all(int(m.sum()) == int(then[0][n].sum()) for n, m in first[0].items())


def test_cycles_go_back_to_the_first_weights(models: dict[str, Model]) -> None:
    """After the last cut, with no step to follow, what is left is what it was at first."""
    model = models["llama"]
    module, _, _ = taught(model, Thinning(HALF, cycles=2, rewind=True, begin=0.0, end=1.0))
    for name, W in linears(module, model).items():
        assert torch.equal(W, torch.where(W != 0, model.matrix(name), 0.0))
    learned, _, _ = taught(model, Thinning(HALF, cycles=2, begin=0.0, end=1.0))
    name = model.linears[0]
    assert not torch.equal(learned.get_parameter(name), module.get_parameter(name))


def test_scores_stop_with_the_last_mask(models: dict[str, Model]) -> None:
    seen = list[tuple[float, bool]]()

    class Watched(Thinned):
        def gradients(self, step: int, done: float) -> None:
            super().gradients(step, done)
            scored = self.matrices[0].scored
            assert scored is not None
            seen.append((done, scored.scores.grad is not None))

    model = models["llama"]
    module = materialise(model).requires_grad_(True).train()
    shaping = Watched(module, model, PLANS["movement"])
    assert {*shaping.rates} <= {n for n, _ in module.named_parameters()} and len(shaping.rates) == 14
    objective = NextToken(module, Losses(soft=0.0, hard=1.0))
    pace = Pace(steps=STEPS, peak=1e-3)
    train(module, objective, Order(EXAMPLES, 4, seed=0).batch, pace, Keeper(), shaping=shaping)
    assert [alive for _, alive in seen] == [done <= 8 / 12 for done, _ in seen]


def test_zeros_stay_under_decay_momentum_and_average() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand(8, 8) < 0.5, 0.0)
    zero = layer.weight.detach() == 0

    class Plain:
        extra = None

        def count(self, batch: Any) -> int:
            return len(batch.ids)

        def loss(self, batch: Any) -> Tensor:
            return (layer(batch.ids[:, :8].float()) - 1).pow(2).mean()

    pace = Pace(steps=9, peak=0.1, decay=0.1, average=0.9)
    batches = Order(EXAMPLES, 4, seed=0).batch
    train(layer, Plain(), batches, pace, Keeper(), shaping=Held({layer.weight: zero}))
    assert torch.equal(layer.weight == 0, zero)
