"""Forward passes of a model of which one block is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from pocketsize.errors import UnsupportedError
from pocketsize.models.device import working_device
from pocketsize.models.model import Model
from pocketsize.models.skeleton import fill, skeleton, stored

T = TypeVar("T")
Read = Callable[[str], Tensor]


def surroundings(module: nn.Module, model: Model) -> list[str]:
    """Names of all that a checkpoint stores outside the blocks: embedding, last norm, head."""
    return [name for name, _ in stored(module) if not name.startswith(f"{model.arch.blocks}.")]


def without_blocks(model: Model, read: Read) -> nn.Module:
    """The model's module on the device that works, with what `read` gives for all outside its blocks.

    Those stay empty.
    """
    module = skeleton(model, working_device())
    for name in surroundings(module, model):
        fill(module, name, read, working_device())
    return module


@torch.no_grad()
def stream(module: nn.Module, model: Model, read: Read, calls: Sequence[Callable[[], T]]) -> list[T]:
    """What each call answers. All of them run one block before the next block is read.

    A call is a forward pass of `module`, which is as `without_blocks` made it. It waits where a block
    begins until that block is there, and ends behind the last one. Contexts such as autocast are entered
    around all calls, not in one: what a waiting call has entered would hold for the others too.
    """
    driver = getcurrent()
    blocks = [module.get_submodule(path) for path in model.blocks]

    def wait(block: nn.Module) -> None:
        driver.switch(block)

    runs: list[Any] = [greenlet(call) for call in calls]
    with _entered(blocks, wait):
        stops = [run.switch() for run in runs]
        for block, path in zip(blocks, model.blocks, strict=True):
            if any(stop is not block for stop in stops):
                raise UnsupportedError(f"{path}: the forward pass of its family does not run it in its turn")
            fill(module, path, read, working_device())
            stops = [run.switch() for run in runs]
            block.to("meta")
    if not all(run.dead for run in runs):
        raise UnsupportedError(f"{model.blocks[-1]}: the forward pass of its family goes on to another block")
    return stops


@contextmanager
def _entered(blocks: Sequence[nn.Module], wait: Callable[[nn.Module], None]) -> Iterator[None]:
    """Something to do before the forward pass of each block, also where a family calls that by its name."""

    def waiting(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            wait(block)
            return forward(*args, **options)

        return run

    for block in blocks:
        block.forward = waiting(block, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def hooked(modules: Sequence[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """A hook before the forward pass of each module and before other hooks, gone when the block ends."""
    handles = [m.register_forward_pre_hook(hook, prepend=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
