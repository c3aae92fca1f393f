"""A model of which only narrow corrections of its matrices learn: they are added in at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pocketsize.errors import UsageError
from pocketsize.models.model import Model

# What the parameters of a linear are called that learn instead of its weight.
DOWN, UP = "lora_down", "lora_up"


@dataclass(frozen=True, slots=True)
class Adapter:
    """The correction of one linear: W x + alpha / rank * B (A x), of which A and B learn and W does not.

    LoRA (arXiv:2106.09685, section 4.1): B begins at zero, so that nothing is changed at first. `kept` is
    where a pruned matrix has no zero; the correction has none elsewhere.
    """

    linear: nn.Module
    scale: float
    transposed: bool
    kept: Tensor | None = None

    @property
    def change(self) -> Float[Tensor, "out in"]:
        """What is added to the matrix, a row for each output."""
        found = self.scale * (self.linear.get_parameter(UP) @ self.linear.get_parameter(DOWN))
        return found if self.kept is None else found * self.kept.to(found.device)

    def adds(self, X: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        """What is added to the output."""
        if self.kept is not None:
            return F.linear(X, self.change)
        return self.scale * F.linear(
            F.linear(X, self.linear.get_parameter(DOWN)), self.linear.get_parameter(UP)
        )


@contextmanager
def adapted(module: nn.Module, model: Model, rank: int, alpha: float, seed: int) -> Iterator[list[Adapter]]:
    """While it is entered, the linears of the blocks learn by adapters and nothing else of the module does.

    A head for classes does: it may be new. When it ends the corrections are in the matrices, and the module
    is as it was made; after an error it is left as it is.
    """
    module.requires_grad_(False)
    if model.arch.task == "classify":
        around = tuple(f"{part}." for part in (model.arch.blocks, model.arch.embedding.rsplit(".", 2)[0]))
        for name, p in module.named_parameters():
            p.requires_grad_(not name.startswith(around))
    generator, found, handles = torch.Generator().manual_seed(seed), list[Adapter](), []
    for name in model.linears:
        linear = module.get_submodule(name.removesuffix(".weight"))
        W = linear.get_parameter("weight")
        rows, columns = model.matrix_shape(name)
        down = torch.randn(rank, columns, generator=generator) * columns**-0.5
        linear.register_parameter(DOWN, nn.Parameter(down.to(W.device)))
        linear.register_parameter(UP, nn.Parameter(torch.zeros(rows, rank, device=W.device)))
        kept = model.mask(name).to(W.device) if model.pattern is not None else None
        one = Adapter(linear, alpha / rank, model.arch.is_transposed(name), kept)

        def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, one: Adapter = one) -> Tensor:
            return out + one.adds(args[0]).view_as(out)

        handles.append(linear.register_forward_hook(add))
        found.append(one)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    _merge(found)


@torch.no_grad()
def _merge(adapters: list[Adapter]) -> None:
    for one in adapters:
        change = one.change
        one.linear.get_parameter("weight").add_(change.T if one.transposed else change)
        del one.linear._parameters[DOWN], one.linear._parameters[UP]


def narrow_parameters(model: Model, rank: int) -> int:
    """How many numbers the adapters of a model have."""
    return sum(rank * sum(model.matrix_shape(name)) for name in model.linears)


def check_rank(model: Model, rank: int, kind: str) -> None:
    """Refuses a rank that saves nothing: adapters as large as the matrices themselves."""
    widest = max(min(model.matrix_shape(name)) for name in model.linears)
    if rank >= widest:
        raise UsageError(f"{kind}: lora: {rank} is no narrow correction; the matrices have rank {widest}")
