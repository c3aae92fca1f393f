"""Processes that train together, as `torchrun` starts them; one process alone is a world of its own."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# The longest that a tensor is waited for after it has arrived.
HELD_S = 5.0


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
        _carried(dist.all_reduce, *tensors)

    def told(self, value: T) -> T:
        """The value that the first process has."""
        said = np.frombuffer(pickle.dumps(value) if self.rank == 0 else b"", dtype=np.uint8).copy()
        size = torch.tensor(len(said))
        _carried(partial(dist.broadcast, src=0), size)
        data = torch.from_numpy(np.resize(said, int(size)))
        _carried(partial(dist.broadcast, src=0), data)
        return cast(T, pickle.loads(data.numpy().tobytes()))


def _carried(collective: Callable[[Tensor], object], *tensors: Tensor) -> None:
    """Run the collective on each tensor, and wait until nobody but the caller holds any.

    A thread of gloo lets go of what it carried a moment after it has arrived. If nobody else holds it by
    then and the interpreter is ending, the process is aborted.
    """
    holders = [cast(Callable[[], int], cast(Any, tensor)._use_count) for tensor in tensors]
    before = [count() for count in holders]
    for tensor in tensors:
        collective(tensor)
    until = time.monotonic() + HELD_S
    while any(count() > n for count, n in zip(holders, before, strict=True)) and time.monotonic() < until:
        time.sleep(0)


def own_gpus() -> bool:
    """Whether each process on this machine has a GPU of its own."""
    return torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def together() -> Iterator[World]:
    """The world that `torchrun` made, by its variables; without them, this process alone.

    What is in memory of the CPU travels by gloo; gradients on GPUs by NCCL, where each process has its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Solo()
        return
    backend = "gloo"
    if own_gpus():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
