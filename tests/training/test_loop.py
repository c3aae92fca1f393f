from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oracles import distillation as oracle
from pocketsize.distillation.schedule import rate
from pocketsize.errors import NumericalError, Stopped, UsageError
from pocketsize.training import loop
from pocketsize.training.examples import Batch, Order, of_rows
from pocketsize.training.loop import Course, Pace, train

EXAMPLES = of_rows([np.arange(3) + i for i in range(12)], 0, "numbers")


@dataclass
class Memory:
    """Checkpoints in memory; a stop comes once so many steps are done."""

    stop_at: int = 10**9
    kept: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    saves: int = 0
    step: int = 0
    log: list[int] = field(default_factory=list)

    def last(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
        return copy.deepcopy(self.kept)

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.kept = copy.deepcopy((dict(tensors), dict(facts)))
        self.saves += 1

    @property
    def stopping(self) -> bool:
        self.step += 1
        return self.step >= self.stop_at

    def safe_point(self, where: str) -> None:
        if self.step >= self.stop_at:
            raise Stopped(f"stopped {where}")


class Regression:
    """Predicts the sum of a row's numbers; with dropout, so that chance takes part."""

    extra = nn.Linear(2, 2)

    def __init__(self, module: nn.Module, spoil: frozenset[int] = frozenset()) -> None:
        self.module, self.spoil, self.calls = module, spoil, 0
        self.extra = nn.Linear(1, 1)
        nn.init.constant_(self.extra.weight, 1.0)

    def count(self, batch: Batch) -> int:
        return len(batch.ids)

    def loss(self, batch: Batch) -> Tensor:
        self.calls += 1
        x = batch.ids.float()
        found = self.extra(self.module(x))[:, 0]
        loss = ((found - x.sum(1) / 10) ** 2).mean()
        return loss * (math.nan if self.calls in self.spoil else 1.0)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1)).train()


def taught(pace: Pace, keeper: Memory, **options: Any) -> tuple[nn.Module, Course]:
    module = model()
    objective = Regression(module, options.pop("spoil", frozenset()))
    return module, train(module, objective, Order(EXAMPLES, 5, seed=1).batch, pace, keeper, **options)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("extras", [{}, {"average": 0.9}, {"accumulate": 3}, {"patience": 50, "look": 2}])
def test_a_training_cut_off_after_any_step_ends_with_the_same_weights(extras: dict[str, Any]) -> None:
    pace = Pace(steps=11, peak=1e-2, seed=3, **extras)
    judge = {"held_out": lambda: 1.0} if "patience" in extras else {}
    whole, course = taught(pace, Memory(), **judge)
    for cut in range(1, 11):
        keeper = Memory(stop_at=cut)
        with pytest.raises(Stopped):
            taught(pace, keeper, **judge)
        keeper.stop_at = 10**9
        again, other = taught(pace, keeper, **judge)
        assert torch.equal(weights(again), weights(whole)), cut
        assert (other.step, other.tokens, other.losses, other.looks) == (
            course.step,
            course.tokens,
            course.losses,
            course.looks,
        )


def test_batches_know_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()
    whole = Regression.loss
    monkeypatch.setattr(Regression, "loss", lambda self, b: (seen.append(b.turn), whole(self, b))[1])
    taught(Pace(steps=3, accumulate=2, peak=1e-2), Memory())
    assert seen == [0, 1, 2, 3, 4, 5]


def test_updates_are_adamw_with_the_rates_of_the_schedule() -> None:
    module = nn.Linear(3, 1, bias=False)
    nn.init.constant_(module.weight, 0.5)
    start, seen = module.weight.detach().clone(), list[Tensor]()
    module.weight.register_hook(lambda g: seen.append(g.clone()))

    class Plain:
        extra = None

        def count(self, batch: Batch) -> int:
            return len(batch.ids)

        def loss(self, batch: Batch) -> Tensor:
            return (module(batch.ids.float()) ** 2).mean()

    pace = Pace(steps=7, peak=1e-2, warmup=0.3, floor=0.2, decay=0.1, clip=1e9)
    train(module, Plain(), Order(EXAMPLES, 5, seed=1).batch, pace, Memory())
    rates = [1e-2 * rate((t + 1) / 7, warmup=0.3, floor=0.2) for t in range(7)]
    assert torch.allclose(module.weight.detach().double(), oracle.adamw(start, seen, rates, 0.1), atol=1e-6)


def test_batches_that_are_put_together_count_by_their_items() -> None:
    """Two batches of 5 and 2 rows give the gradient of one batch of 7."""
    parts = {0: EXAMPLES.batch(range(5)), 1: EXAMPLES.batch([5, 6])}
    both = {0: EXAMPLES.batch(range(7))}
    found = []
    for batches, accumulate in ((parts, 2), (both, 1)):
        module = model().eval()
        objective = Regression(module)
        train(
            module, objective, batches.__getitem__, Pace(steps=1, accumulate=accumulate, warmup=0.0), Memory()
        )
        found.append(weights(module))
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_a_step_that_is_not_finite_is_left_out_and_counted() -> None:
    module, course = taught(Pace(steps=6, peak=1e-2), Memory(), spoil=frozenset({2, 3}))
    assert course.skipped == 2 and course.brake == 0.25 and bool(weights(module).isfinite().all())
    assert [step for step, _ in course.losses] == [1, 4, 5, 6]
    with pytest.raises(
        NumericalError, match=r"8 steps in a row were not finite; use a learning rate below 0[.]01"
    ):
        taught(Pace(steps=20, peak=1e-2), Memory(), spoil=frozenset(range(2, 50)))
    with pytest.raises(NumericalError, match=r"the rate is not the cause: look at temperature: 1e-42"):
        pace = Pace(steps=20, peak=1e-2, terms="temperature: 1e-42")
        taught(pace, Memory(), spoil=frozenset(range(50)))


def test_an_early_end_gives_the_best_weights() -> None:
    looks = iter([3.0, 2.0, 5.0, 4.0, 9.0])
    keeper = Memory()
    module, course = taught(
        Pace(steps=100, peak=1e-2, patience=2, look=3), keeper, held_out=lambda: next(looks)
    )
    assert course.step == 12 and course.looks == [(3, 3.0), (6, 2.0), (9, 5.0), (12, 4.0)]
    # The schedule is that of 100 steps, of which the first 6 were the best.
    until = Memory(stop_at=6)
    with pytest.raises(Stopped):
        taught(Pace(steps=100, peak=1e-2), until)
    assert until.kept is not None
    names = [name for name, _ in module.named_parameters()]
    assert all(torch.equal(module.get_parameter(n), until.kept[0][f"weight.{n}"]) for n in names)


def test_the_average_of_weights_becomes_the_student() -> None:
    last, _ = taught(Pace(steps=9, peak=1e-2), Memory())
    mean, _ = taught(Pace(steps=9, peak=1e-2, average=0.999), Memory())
    start = weights(model())
    assert (weights(mean) - start).norm() < 0.1 * (weights(last) - start).norm()


def test_minutes_end_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: 6.0 * next(clock))
    _, course = taught(Pace(minutes=1.0), Memory())
    assert 2 <= course.step <= 10 and course.elapsed_s >= 60


def test_losses_of_a_long_training_are_put_together() -> None:
    losses: list[tuple[int, float]] = []
    for step in range(1, 1001):
        loop._note(losses, step, 1.0)
    assert len(losses) < 400 and losses[-1][0] == 1000 and {loss for _, loss in losses} == {1.0}


@pytest.mark.parametrize(
    ("options", "word"),
    [({"steps": 0}, "steps"), ({"steps": 1, "peak": 0.0}, "peak"), ({"steps": 1, "average": 1.0}, "average")],
)
def test_what_is_no_pace_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Pace(**options)
    with pytest.raises(ValueError, match="a number of steps or of minutes"):
        Pace()
