"""Processes that train together, as `torchrun` starts them; one process alone is a world of its own."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class World(Protocol):
    """Who works on one training: `size` processes, of which this is number `rank`."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many processes there are."""
        ...

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        ...

    def told(self, value: T) -> T:
        """The value that the first process has."""
        ...


@dataclass(frozen=True, slots=True)
class Solo:
    """One process: there is nobody to ask."""

    rank: int = 0
    size: int = 1

    def add(self, tensors: Sequence[Tensor]) -> None:
        """They are the sums already."""

    def told(self, value: T) -> T:
        """The value itself."""
        return value


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a group that torch knows of."""

    rank: int
    size: int

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        for tensor in tensors:
            dist.all_reduce(tensor)

    def told(self, value: T) -> T:
        """The value that the first process has."""
        box: list[object] = [value]
        dist.broadcast_object_list(box, src=0)
        return cast(T, box[0])


@contextmanager
def together() -> Iterator[World]:
    """The world that `torchrun` made, by its variables; without them, this process alone.

    Gradients travel by gloo, or by NCCL where each process has a GPU of its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Solo()
        return
    dist.init_process_group("nccl" if torch.cuda.device_count() > 1 else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
        # Gloo's threads let go of what was sent a moment after it has arrived. One that still does so while
        # the interpreter ends aborts the process; collecting takes longer than that.
        gc.collect()
