"""What leaving slices out would cost, told from gradients: one pass back through the blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pocketsize.distillation.slices import Importance
from pocketsize.models.backward import Ends, Seen, backward_walk
from pocketsize.models.model import Model
from pocketsize.models.surgery import writers_of


def slice_costs(
    model: Model,
    input_ids: Int64[Tensor, "n length"],
    mask: Bool[Tensor, "n length"],
    watched: Mapping[str, int],
    *,
    seed: int = 0,
) -> dict[str, Importance]:
    """The Taylor importance of the slices of what each of these linears reads, in the form of `Importance`.

        I_j = sqrt( sum over tokens ( sum of w * dL/dw over the weights that read slice j )^2 )

    That sum is the first-order change of the loss once slice j is gone (arXiv:1906.10771; LLM-Pruner,
    arXiv:2305.11627, section 3.2), here token by token: sum w g = x_j . dL/dx_j. With the loss of
    `backward_walk` its mean square is the Fisher information of a gate on the slice: what KL to the whole
    model is made of to second order, where first-order sums over true tokens cancel out near a minimum. Where
    several linears read the tensor, the slice is gone for all of them.
    """
    found: dict[str, Importance] = {}
    readers = {f"{path}.{g.names[0]}": g.names for path in model.blocks for g in model.groups}
    for path, seen in backward_walk(model, input_ids, mask, seed=seed):
        if isinstance(seen, Ends):
            continue
        for name, width in watched.items():
            if name.startswith(f"{path}."):
                parts = [f"{path}.{one}.weight" for one in readers[name]]
                terms = sum(_terms(model, one, seen[one]) for one in parts)
                assert isinstance(terms, Tensor)
                sliced = terms.unflatten(-1, (-1, width)).sum(-1)
                found[name] = Importance(sliced.square().sum(0, dtype=torch.float64).cpu(), width)
    return found


def block_costs(
    model: Model, input_ids: Int64[Tensor, "n length"], mask: Bool[Tensor, "n length"], *, seed: int = 0
) -> list[float]:
    """The Taylor importance of each block, in running order: of all weights that write to what passes it.

    The first-order change of the loss once both halves of the block add nothing, squared, token by token, as
    in `slice_costs`.
    """
    found: dict[str, float] = {}
    for path, seen in backward_walk(model, input_ids, mask, seed=seed):
        if isinstance(seen, Ends):
            continue
        terms = [
            _terms(model, f"{path}.{name}.weight", seen[f"{path}.{name}.weight"])
            for name in writers_of(model)
        ]
        found[path] = float(
            torch.stack([one.sum(-1) for one in terms]).sum(0).square().sum(dtype=torch.float64)
        )
    return [found[path] ** 0.5 for path in model.blocks]


def _terms(model: Model, name: str, seen: Seen) -> Float[Tensor, "t in"]:
    """x * dL/dx of a linear, at each token."""
    X, gradient = seen.joined()
    W = model.as_stored(name, model.weight(name)).to(X.device)
    return X.float() * (gradient.float() @ W)
