"""The walk with nothing clever: the whole model in memory, run from the start for every site."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise, skeleton


def matrix_of(model: Model, name: str) -> Tensor:
    """The weight of a linear with a row for each output, by the class of its module."""
    owner = skeleton(model).get_submodule(name.removesuffix(".weight"))
    return model.original(name).T if isinstance(owner, Conv1D) else model.original(name)


@torch.no_grad()
def gram_of(model: Model, replaced: dict[str, Tensor], name: str, input_ids: Tensor, mask: Tensor) -> Tensor:
    """E[x x^T] of what the linear `name` reads, with the weights in `replaced` in place."""
    rows = rows_of(model, replaced, name, input_ids, mask).double()
    return (rows.T @ rows / len(rows)).float()


@torch.no_grad()
def rows_of(
    model: Model,
    replaced: dict[str, Tensor],
    name: str,
    input_ids: Tensor,
    mask: Tensor,
    *,
    first: bool = False,
) -> Tensor:
    """Every row that the linear `name` reads, one text at a time, without padding.

    With `first`, the row of each text's first position alone.
    """
    module = materialise(model)
    for other, new in replaced.items():
        owner = module.get_submodule(other.removesuffix(".weight"))
        owner.weight = nn.Parameter(new.T if isinstance(owner, Conv1D) else new)
    linear = module.get_submodule(name.removesuffix(".weight"))
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for ids, real in zip(input_ids, mask, strict=True):
        length = int(real.sum())
        module(input_ids=ids[None, :length])
    handle.remove()
    rows = [x.flatten(0, -2) for x in seen]
    return torch.cat([x[:1] for x in rows] if first else rows)
