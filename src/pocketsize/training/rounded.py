"""A model whose matrices are on their grids while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pocketsize.models.model import Model
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.learned import still
from pocketsize.quantization.ste import on_grid, rescaled, settled
from pocketsize.training.masked import Held


class Grid(nn.Module):
    """What a linear multiplies while scales, free zeros and codes of it may learn: a parametrization."""

    def __init__(self, start: QWeight, *, transposed: bool, scales: bool) -> None:
        super().__init__()
        self.start, self.transposed = start, transposed
        self.moved = nn.ParameterList([nn.Parameter(T) for T in still(start)] if scales else [])

    def as_kept(self, Q: Tensor) -> Tensor:
        """The matrix as the family keeps it."""
        return Q.T if self.transposed else Q


class Rounded(Grid):
    """Codes learn: the linear's parameter is places on the axis of its codes, stored as `on_grid` says."""

    def forward(self, place: Tensor) -> Tensor:
        """The matrix as the family keeps it."""
        return self.as_kept(on_grid(place, list(self.moved), self.start))

    def right_inverse(self, _: Tensor) -> Tensor:
        """The middle of the cell of each code: to leave it, a place must be pushed the same way for long.

        Where originals lie, many are at the border, since a solver chose their codes to make up for others;
        there the first steps of Adam, of full size whatever the gradient, would undo what it did.
        """
        return self.start.codes.to(torch.float32).view(*self.start.scale.shape, -1)


class Rescaled(Grid):
    """Codes stay: scales and free zeros learn alone, and the linear's parameter is empty."""

    def forward(self, _: Tensor) -> Tensor:
        """The matrix as the family keeps it."""
        return self.as_kept(rescaled(list(self.moved), self.start))

    def right_inverse(self, W: Tensor) -> Tensor:
        """Nothing: the codes hold what there is to know."""
        return W.new_zeros(0)


def put_on_grids(
    module: nn.Module, model: Model, start: Mapping[str, QWeight], *, scales: bool, codes: bool = True
) -> dict[str, Grid]:
    """Let a module have the model's linears on these grids, and nothing else to learn; by parameter name.

    Where codes stay, embedding and head that are quantized are on their grids as well, and a tied head goes
    on being the embedding. Where codes learn they stay as they are: most rows of a vocabulary have next to
    no gradient, which the optimizer would make steps of full size.
    """
    module.requires_grad_(False)
    found: dict[str, Grid] = {}
    kind = Rounded if codes else Rescaled
    for name in model.linears if codes else (*model.linears, *model.ends):
        if name not in start:
            continue
        owner, _, attribute = name.rpartition(".")
        linear = module.get_submodule(owner)
        weight = start[name].to(linear.get_parameter(attribute).device)
        one = kind(weight, transposed=model.arch.is_transposed(name), scales=scales)
        parametrize.register_parametrization(linear, attribute, one, unsafe=True)
        found[name] = one
    if model.tied and model.arch.embedding in found:
        _tie(module, model.arch.embedding, found[model.arch.embedding])
    if codes:
        for p in _places(module, found).values():
            p.requires_grad_(True)
    return found


def _tie(module: nn.Module, embedding: str, one: Grid) -> None:
    """Let the head multiply by what the embedding becomes, and both learn the same numbers."""
    head = cast(Any, module).get_output_embeddings()
    parametrize.register_parametrization(head, "weight", one, unsafe=True)
    head.parametrizations.weight.original = module.get_parameter(_place(embedding))


@torch.no_grad()
def zeros_still(module: nn.Module, rounded: Mapping[str, Grid], model: Model) -> Held | None:
    """What holds the zeros of a pruned model, quantized with them, at their codes; None if none can move."""
    if model.pattern is None or any(isinstance(one, Rescaled) for one in rounded.values()):
        return None
    found: dict[nn.Parameter, Tensor] = {}
    for name, place in _places(module, rounded).items():
        found[place] = ~model.mask(name).to(place.device).view(place.shape)
        place.copy_(torch.where(found[place], rounded[name].start.codes.view(place.shape), place))
    return Held(found)


@torch.no_grad()
def taken_off(module: nn.Module, rounded: Mapping[str, Grid]) -> dict[str, QWeight]:
    """The matrices as they are to be stored now."""
    return {
        name: settled(place.detach() if place.numel() else None, [m.detach() for m in one.moved], one.start)
        for (name, one), place in zip(rounded.items(), _places(module, rounded).values(), strict=True)
    }


def _places(module: nn.Module, rounded: Mapping[str, Grid]) -> dict[str, nn.Parameter]:
    return {name: module.get_parameter(_place(name)) for name in rounded}


def _place(name: str) -> str:
    """The name that a matrix's own parameter has while the matrix is on a grid."""
    owner, _, attribute = name.rpartition(".")
    return f"{owner}.parametrizations.{attribute}.original"
