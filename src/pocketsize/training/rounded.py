"""A model whose matrices are on their grids while it is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pocketsize.models.model import Model
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.learned import places_of, still
from pocketsize.quantization.ste import on_grid, settled
from pocketsize.training.masked import Held


class Rounded(nn.Module):
    """What a linear multiplies: places on the axis of its codes, as they are stored (`on_grid`).

    A parametrization: the linear's parameter is then the places. Scales learn too where `scales`.
    """

    def __init__(self, start: QWeight, *, transposed: bool, scales: bool) -> None:
        super().__init__()
        self.start, self.transposed = start, transposed
        self.moved = nn.ParameterList([nn.Parameter(T) for T in still(start)] if scales else [])

    def forward(self, place: Tensor) -> Tensor:
        """The matrix as the family keeps it."""
        Q = on_grid(place, list(self.moved), self.start)
        return Q.T if self.transposed else Q

    def right_inverse(self, W: Tensor) -> Tensor:
        """Places of the original weights, each within the cell of the code that it starts from."""
        return places_of((W.T if self.transposed else W).detach(), self.start)


def put_on_grids(
    module: nn.Module, model: Model, start: Mapping[str, QWeight], *, scales: bool
) -> dict[str, Rounded]:
    """Let a module have the model's linears on these grids, and nothing else to learn; by parameter name.

    The module holds the original matrices; what is quantized of it that is no linear stays as it is.
    """
    module.requires_grad_(False)
    found: dict[str, Rounded] = {}
    for name in model.linears:
        if name not in start:
            continue
        owner, _, attribute = name.rpartition(".")
        linear = module.get_submodule(owner)
        weight = start[name].to(linear.get_parameter(attribute).device)
        one = Rounded(weight, transposed=model.arch.is_transposed(name), scales=scales)
        linear.get_parameter(attribute).data = model.as_stored(name, model.matrix(name)).to(
            weight.scale.device
        )
        parametrize.register_parametrization(linear, attribute, one, unsafe=True)
        found[name] = one
    for p in _places(module, found).values():
        p.requires_grad_(True)
    return found


@torch.no_grad()
def zeros_still(module: nn.Module, rounded: Mapping[str, Rounded], model: Model) -> Held | None:
    """What holds the zeros of a pruned model, quantized with them, at their codes; None for another one."""
    if model.pattern is None:
        return None
    found: dict[nn.Parameter, Tensor] = {}
    for name, place in _places(module, rounded).items():
        found[place] = ~model.mask(name).to(place.device).view(place.shape)
        place.copy_(torch.where(found[place], rounded[name].start.codes.view(place.shape), place))
    return Held(found)


@torch.no_grad()
def taken_off(module: nn.Module, rounded: Mapping[str, Rounded]) -> dict[str, QWeight]:
    """The matrices as they are to be stored now."""
    return {
        name: settled(place.detach(), [m.detach() for m in rounded[name].moved], rounded[name].start)
        for name, place in _places(module, rounded).items()
    }


def _places(module: nn.Module, rounded: Mapping[str, Rounded]) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for name in rounded:
        owner, _, attribute = name.rpartition(".")
        found[name] = module.get_parameter(f"{owner}.parametrizations.{attribute}.original")
    return found
