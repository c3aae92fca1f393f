"""Blocks whose weights, gradients and moments are spread over the processes of a training (FSDP2)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from pocketsize.distributed.world import World, own_gpus
from pocketsize.errors import UsageError


@contextmanager
def spread(module: nn.Module, blocks: Sequence[str], world: World) -> Iterator[None]:
    """While it is entered every process keeps a part of each block; then each has all of them again.

    A block is brought together as it computes, and let go of afterwards; its gradients are sums over the
    processes and stay where their part of the weights is. What is outside the blocks every process has.
    """
    if world.size == 1:
        yield
        return
    # They take most of a second to import, and one process needs none of it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(module.parameters()).device.type
    if device == "cuda" and not own_gpus():
        raise UsageError(
            "sharded: there are fewer GPUs than processes; start one for each GPU, or leave it out"
        )
    mesh = init_device_mesh(device, (world.size,))
    parts = [module.get_submodule(name) for name in blocks]
    for part in parts:
        own = cast(Any, fully_shard(part, mesh=mesh, reshard_after_forward=True))
        own.set_gradient_divide_factor(1.0)
        own.set_force_sum_reduction_for_comms(True)  # gloo cannot scale what it adds up
    yield
    for part in parts:
        _gather(part, world)


def is_spread(tensor: Tensor) -> bool:
    """Whether this process has a part of it alone."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def whole(tensor: Tensor, world: World) -> Tensor:
    """All of a tensor, in memory of the CPU where it was spread: every process has to ask.

    The parts are added up into zeros: nobody waits until gloo lets go of what it gathers (`world._carried`).
    """
    if not is_spread(tensor):
        return tensor
    part = cast(Tensor, cast(Any, tensor).to_local())
    found = torch.zeros(tensor.shape, dtype=part.dtype, device=part.device)
    rows = -(-tensor.shape[0] // world.size)  # of each process; the last ones may have fewer
    found[world.rank * rows : world.rank * rows + len(part)] = part
    world.add([found])
    return found.cpu()


def laid_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that every process has, spread as the other one is if it has its shape."""
    if not is_spread(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    to = cast(Any, other)
    return distribute_tensor(tensor.to(other.device), to.device_mesh, to.placements)


def clip_gradients(parameters: Collection[nn.Parameter], most: float, world: World) -> Tensor:
    """Scale all gradients down to this norm if theirs is larger; what it was, over all processes."""
    slopes = [p.grad for p in parameters if p.grad is not None]
    if not any(map(is_spread, slopes)):
        return torch.nn.utils.clip_grad_norm_(parameters, most, foreach=True)
    apart = [cast(Tensor, cast(Any, slope).to_local()) for slope in slopes if is_spread(slope)]
    shared = [slope for slope in slopes if not is_spread(slope)]
    squares = torch.nn.utils.get_total_norm(apart, foreach=True).square()
    world.add([squares])
    norm = (squares + torch.nn.utils.get_total_norm(shared, foreach=True).square()).sqrt()
    share = (most / (norm + 1e-6)).clamp(max=1.0)
    for slope in (*apart, *shared):
        slope.mul_(share)
    return norm


@torch.no_grad()
def _gather(block: nn.Module, world: World) -> None:
    """Give every process all of a block."""
    for owner in block.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            if is_spread(p):
                owner._parameters[name] = nn.Parameter(whole(p, world), requires_grad=p.requires_grad)
