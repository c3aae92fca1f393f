"""The walk with nothing clever: the whole model in memory, run from the start for every site."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise


@torch.no_grad()
def gram_of(
    model: Model,
    replaced: dict[str, Tensor],
    name: str,
    input_ids: Tensor,
    mask: Tensor,
    *,
    first: bool = False,
) -> Tensor:
    """E[x x^T] of what the linear `name` reads, with the weights in `replaced` in place.

    With `first`, of the first position of each text alone.
    """
    module = materialise(model)
    for other, new in replaced.items():
        owner, _, attribute = other.rpartition(".")
        setattr(module.get_submodule(owner), attribute, nn.Parameter(new))
    linear = module.get_submodule(name.removesuffix(".weight"))
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for ids, real in zip(input_ids, mask, strict=True):
        length = int(real.sum())
        module(input_ids=ids[None, :length])
    handle.remove()
    rows = torch.cat([(x[:, :1] if first else x).flatten(0, -2) for x in seen]).double()
    return (rows.T @ rows / len(rows)).float()
