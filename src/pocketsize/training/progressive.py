"""One block after the other: each learns to give what its teacher's gives, before all learn together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pocketsize.training.examples import Batch
from pocketsize.training.features import Features
from pocketsize.training.objective import Objective, Teacher, states


@dataclass(frozen=True)
class Stages:
    """Which steps teach one block alone: the first `steps`, as many for each of the `blocks`.

    MobileBERT's progressive knowledge transfer (arXiv:2004.02984, section 3.5), from the side of the input.
    """

    steps: int
    blocks: int
    accumulate: int = 1

    def block(self, number: int) -> int | None:
        """The block that the batch with this number teaches; None for all of the student."""
        step = number // self.accumulate
        return step * self.blocks // self.steps if step < self.steps else None

    def over(self, plain: Callable[[int], Batch], rest: Callable[[int], Batch]) -> Callable[[int], Batch]:
        """Batches of which the first, plain ones, know which block they teach."""

        def batch(number: int) -> Batch:
            block = self.block(number)
            return rest(number) if block is None else replace(plain(number), block=block)

        return batch


@dataclass
class Progressive:
    """An objective for which batches that teach one block stand for the distance of what that gives.

    Of such a batch both models compute no more than up to that block. Blocks before it stay as they are:
    what a block reads is taken as given. `features` says which block follows which, and compares `hidden`.
    """

    whole: Objective
    student: nn.Module
    teacher: Teacher
    features: Features
    dtype: torch.dtype = torch.float32

    @property
    def extra(self) -> nn.Module | None:
        """Projections of the blocks, and what the objective itself has."""
        parts = {"blocks": self.features, **({} if self.whole.extra is None else {"whole": self.whole.extra})}
        return nn.ModuleDict(parts)

    def count(self, batch: Batch) -> int:
        """Items of the objective."""
        return self.whole.count(batch)

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The distance of one block's hidden states, or the objective itself."""
        if batch.block is None:
            return self.whole.loss(batch)
        mine, theirs = self.features.blocks[batch.block]
        first = None if batch.block == 0 else mine
        x = _given(self.student, batch.ids, batch, mine, self.dtype, cut=first)
        with torch.no_grad():
            y = _given(self.teacher.module, self.teacher.reads(batch.ids), batch, theirs, self.dtype)
        return self.features.distance_of(batch.block, x, y, batch.mask)


class _Enough(Exception):
    """Thrown by a block when what it gives is all that was asked for."""

    def __init__(self, given: Tensor) -> None:
        super().__init__("enough")
        self.given = given


def _given(
    module: nn.Module, ids: Tensor, batch: Batch, path: str, dtype: torch.dtype, *, cut: str | None = None
) -> Tensor:
    """What the block at a path gives, float32; nothing behind it runs. No gradient leaves the block `cut`."""
    with _ending_at(module, path, cut):
        try:
            states(module, ids, batch.mask, dtype)
        except _Enough as enough:
            return enough.given.float()
    raise ValueError(f"{path} did not run")


@contextmanager
def _ending_at(module: nn.Module, path: str, cut: str | None) -> Iterator[None]:
    def stop(_: nn.Module, __: Any, output: Any) -> None:
        raise _Enough(output[0] if isinstance(output, tuple) else output)

    def detach(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return tuple(_detached(x) for x in args), {k: _detached(v) for k, v in kwargs.items()}

    handles = [module.get_submodule(path).register_forward_hook(stop)]
    if cut is not None:
        handles.append(module.get_submodule(cut).register_forward_pre_hook(detach, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
