"""A model whose matrices have zeros while it is trained: those that it had, or more and more of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pocketsize.models.model import Model
from pocketsize.pruning.movement import above, by_magnitude, penalty_slope, score_slope
from pocketsize.pruning.pattern import Pattern
from pocketsize.pruning.rigl import drop_and_grow, share_moved
from pocketsize.pruning.schedule import MATRIX, cubic, cuts, masks, ramp, stairs, within
from pocketsize.training.loop import Moments

MAGNITUDE, MOVEMENT, SOFT, RIGL = "magnitude", "movement", "soft_movement", "rigl"
METHODS = (MAGNITUDE, MOVEMENT, SOFT, RIGL)
# What scores are at first.
ZERO = "zero"
STARTS = (ZERO, MAGNITUDE)


class Held:
    """Values that stay what they are: they get no gradient, and so no moment that could move them.

    `still` says of each parameter which. Zeros stay zero with weight decay, too, and so does their average.
    """

    rates: Mapping[str, float] = MappingProxyType({})

    def __init__(self, still: Mapping[nn.Parameter, Tensor]) -> None:
        self.still = still

    def pace(self, done: float) -> float:
        """The schedule of the learning rate is that of the whole training."""
        return done

    def gradients(self, step: int, done: float) -> None:
        """None for what is still."""
        for p, still in self.still.items():
            if p.grad is not None:
                p.grad.masked_fill_(still, 0.0)

    def updated(self, step: int, done: float, moments: Moments) -> None:
        """Nothing is to be decided."""

    def finish(self) -> None:
        """Nothing is left to do."""

    def tensors(self) -> Mapping[str, Tensor]:
        """What is still is known from the model."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """There is nothing to take up."""


def zeros_held(module: nn.Module, model: Model) -> Held | None:
    """What keeps the zeros of a pruned model; None for one that is not."""
    if model.pattern is None:
        return None
    linears = [module.get_parameter(name) for name in model.linears]
    return Held({p: p.detach() == 0 for p in linears})


@dataclass(frozen=True, slots=True)
class Thinning:
    """How zeros are made: from the sparsity `first` to that of the pattern, between two shares of a training.

    Masks are renewed after every so many steps (`every`), or in so many `cycles`, after each of which
    weights are rewound to what they were at first where `rewind`. `fraction` is RigL's, `rate` that of
    scores, which begin as `scores` says, `threshold` and `penalty` those of soft movement pruning.
    """

    pattern: Pattern
    method: str = MAGNITUDE
    scope: str = MATRIX
    first: float = 0.0
    begin: float = 0.1
    end: float = 0.75
    every: int = 10
    cycles: int = 0
    rewind: bool = False
    fraction: float = 0.3
    rate: float = 1e-2
    scores: str = ZERO
    threshold: float = 0.1
    penalty: float = 400.0

    def sparsity(self, done: float) -> float:
        """The share of zeros when so much of the training is over."""
        last, part = self.pattern.sparsity, ramp(done, self.begin, self.end)
        if self.method == RIGL:
            return last if done >= self.begin else self.first
        if self.cycles:
            return stairs(part, self.first, last, self.cycles)
        return cubic(part, self.first, last)


class _Kept(torch.autograd.Function):
    """W where the mask is true; straight through it for scores."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        W, _, mask = given
        ctx.save_for_backward(W, mask)
        return torch.where(mask, W, 0.0)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (W, mask), (g,) = ctx.saved_tensors, outputs
        slope = score_slope(W, g) if ctx.needs_input_grad[1] else None
        return torch.where(mask, g, 0.0), slope, None


class Scored(nn.Module):
    """What a linear multiplies: the weights that its mask keeps. A parametrization, with a score for each."""

    def __init__(self, mask: Tensor, scores: Tensor) -> None:
        super().__init__()
        self.mask, self.scores = mask, nn.Parameter(scores)

    def forward(self, W: Tensor) -> Tensor:
        """The matrix as the family keeps it."""
        return cast(Tensor, _Kept.apply(W, self.scores, self.mask))


@dataclass(slots=True)
class _Matrix:
    """A linear's weights: which may ever be other than zero, which are now, and their scores."""

    name: str
    W: nn.Parameter
    transposed: bool
    alive: Tensor | None
    mask: Tensor
    scored: Scored | None

    def plain(self, T: Tensor) -> Tensor:
        """A tensor of its shape with a row for each output."""
        return T.T if self.transposed else T

    @property
    def score(self) -> Tensor:
        """What it is judged by, with a row for each output; what stays zero comes last."""
        raw = self.W.detach().abs() if self.scored is None else self.scored.scores.detach()
        return self.plain(raw if self.alive is None else raw.masked_fill(~self.alive, -math.inf))

    def take(self, mask: Tensor) -> None:
        """Make this mask its own; what stays zero stays so."""
        self.mask.copy_(self.plain(mask))
        if self.alive is not None:
            self.mask &= self.alive


class Thinned:
    """The linears of a module while zeros are made in them (`Shaping`).

    By magnitude and in RigL weights themselves become zero, and what Adam knew of them is forgotten. In
    movement pruning masked weights wait behind their mask, which scores decide on, until the last mask is
    made: from then on scores learn no more.
    """

    def __init__(self, module: nn.Module, model: Model, plan: Thinning) -> None:
        self.module, self.model, self.plan = module, model, plan
        scored = plan.method in (MOVEMENT, SOFT)
        self.matrices = [_matrix(module, model, name, plan, scored=scored) for name in model.linears]
        self.rates = {_place(one.name, "0.scores"): plan.rate for one in self.matrices if scored}
        # Masks that were made, cuts among them, and whether the last one was.
        self.state = torch.zeros(3, dtype=torch.int64)
        self.slopes: dict[str, Tensor] = {}

    def pace(self, done: float) -> float:
        """Where weights are rewound, each cycle is a training of its own."""
        plan = self.plan
        return within(done, plan.begin, plan.end, plan.cycles) if plan.rewind else done

    def gradients(self, step: int, done: float) -> None:
        """No gradient for zeros, after RigL has seen those that could grow; the penalty's for scores."""
        plan = self.plan
        growing = plan.method == RIGL and bool(self.state[0]) and self._due(step, done)
        self.slopes = {}
        for one in self.matrices:
            if one.scored is None and one.W.grad is not None:
                if growing:
                    self.slopes[one.name] = one.W.grad.clone()
                one.W.grad.masked_fill_(~one.mask, 0.0)
            elif plan.method == SOFT and one.scored is not None:
                self._penalise(one.scored.scores, cubic(ramp(done, plan.begin, plan.end), 0.0, plan.penalty))

    def _penalise(self, scores: nn.Parameter, penalty: float) -> None:
        if scores.grad is not None:
            scores.grad.add_(penalty_slope(scores.detach(), penalty, len(self.matrices)))

    def updated(self, step: int, done: float, moments: Moments) -> float | None:
        """New masks, where it is time for them."""
        if not self._due(step, done):
            return None
        self._renew(done, moments)
        return 1 - sum(int(one.mask.sum()) for one in self.matrices) / self._size

    @torch.no_grad()
    def finish(self) -> float:
        """Zeros where the masks say so, and nothing left of masks; the share that is zero."""
        if not self.state[2]:
            self._renew(1.0, {})
        for one in self.matrices:
            owner, _, attribute = one.name.rpartition(".")
            if one.scored is None:
                one.W.masked_fill_(~one.mask, 0.0)
            else:
                parametrize.remove_parametrizations(self.module.get_submodule(owner), attribute)
        found = [self.module.get_parameter(one.name) for one in self.matrices]
        return sum(int((p == 0).sum()) for p in found) / self._size

    def tensors(self) -> Mapping[str, Tensor]:
        """The masks, and how many were made."""
        return {"state": self.state, **{f"mask.{one.name}": one.mask for one in self.matrices}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with these."""
        self.state.copy_(tensors["state"])
        for one in self.matrices:
            one.mask.copy_(tensors[f"mask.{one.name}"])
        self._rest()

    @property
    def _size(self) -> int:
        return sum(one.mask.numel() for one in self.matrices)

    def _due(self, step: int, done: float) -> bool:
        plan = self.plan
        if self.state[2] or done < plan.begin:
            return False
        if plan.cycles:
            return cuts(ramp(done, plan.begin, plan.end), plan.cycles) > int(self.state[1])
        return done >= plan.end or step % plan.every == 0

    @torch.no_grad()
    def _renew(self, done: float, moments: Moments) -> None:
        plan, last = self.plan, done >= self.plan.end
        if plan.method == RIGL and self.state[0]:
            self._regrow(done)
        elif plan.method == SOFT and not last:
            for one in self.matrices:
                one.take(above(one.score, plan.threshold))
        else:
            self._cut(plan.sparsity(done))
        self.state[0] += 1
        self.state[1] = cuts(ramp(done, plan.begin, plan.end), plan.cycles)
        self.state[2] = last
        self._apply(moments)
        self._rest()

    def _cut(self, sparsity: float) -> None:
        """Masks with so many zeros; matrices that do not compete are looked at one by one."""
        apart = self.plan.scope == MATRIX
        for group in [[one] for one in self.matrices] if apart else [self.matrices]:
            found = masks([one.score for one in group], self.plan.pattern, sparsity, self.plan.scope)
            for one, mask in zip(group, found, strict=True):
                one.take(mask)

    def _regrow(self, done: float) -> None:
        """RigL: of each matrix a share of the weights changes places."""
        plan = self.plan
        share = share_moved(ramp(done, plan.begin, plan.end), plan.fraction)
        for one in self.matrices:
            if one.name in self.slopes and (count := round(share * int(one.mask.sum()))):
                W, slope, mask = (one.plain(T) for T in (one.W, self.slopes[one.name], one.mask))
                one.take(drop_and_grow(W, slope, mask, count, plan.pattern))
        self.slopes = {}

    def _apply(self, moments: Moments) -> None:
        """What is masked becomes zero and is forgotten; where cycles rewind, everything is."""
        if self.plan.rewind:
            for name, p in self.module.named_parameters():
                p.copy_(self.model.weight(name))
                for value in moments.get(p, {}).values():
                    value.zero_()
        for one in self.matrices if self.matrices[0].scored is None else ():
            for value in (one.W, *moments.get(one.W, {}).values()):
                if value.shape == one.mask.shape:
                    value.masked_fill_(~one.mask, 0.0)

    def _rest(self) -> None:
        """Scores learn no more once the last mask is made."""
        for one in self.matrices:
            if self.state[2] and one.scored is not None:
                one.scored.scores.requires_grad_(False)
                one.scored.scores.grad = None


def _place(name: str, what: str) -> str:
    """The path of a part of a parametrized matrix."""
    owner, _, attribute = name.rpartition(".")
    return f"{owner}.parametrizations.{attribute}.{what}"


def _matrix(module: nn.Module, model: Model, name: str, plan: Thinning, *, scored: bool) -> _Matrix:
    W = module.get_parameter(name)
    mask = W.detach() != 0 if plan.first else torch.ones_like(W, dtype=torch.bool)
    # What a pruned model has as zeros stays so; RigL alone may move them.
    alive = mask.clone() if plan.first and plan.method != RIGL else None
    transposed, found = model.arch.is_transposed(name), None
    if scored:
        owner, _, attribute = name.rpartition(".")
        scores = torch.zeros_like(W) if plan.scores == ZERO else by_magnitude(W.detach())
        found = Scored(mask, scores)
        parametrize.register_parametrization(module.get_submodule(owner), attribute, found, unsafe=True)
        W = module.get_parameter(_place(name, "original"))
    return _Matrix(name, W, transposed, alive, mask, found)
