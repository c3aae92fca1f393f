"""Students that at first look their tokens up in a table, and learn from there to read them together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pocketsize.errors import UnsupportedError
from pocketsize.models.arch import arch_of
from pocketsize.models.student import FAMILIES, Body


def require_lookup(family: str) -> None:
    """Refuse a family whose blocks cannot let pass what they are given."""
    if not FAMILIES[family].adds:
        able = ", ".join(name for name, one in FAMILIES.items() if one.adds)
        raise UnsupportedError(
            f"student: start: tokens: is for students of embedders ({able}), not for a {family}; use random"
        )


@torch.no_grad()
def looked_up(
    weights: Mapping[str, Tensor],
    body: Body,
    vectors: Float[Tensor, "tokens width"],
    directions: Float[Tensor, "wide width"],
) -> dict[str, Tensor]:
    """The weights of a student whose embeddings are these vectors, and whose blocks add nothing to them.

    What each block adds to its input is a product with a matrix that is zero now, so that all of them let the
    embeddings pass (SkipInit, arXiv:2002.10444) and yet get gradients. Vectors are coordinates along
    `directions` of the teacher's channels. A student that is as wide as its teacher begins in those channels:
    it is to give what the teacher gives, and has no turn to learn. Any other begins in its first channels; of
    a wider one those that no vector reaches stay as they were drawn, as do rows beyond the last vector.
    """
    arch, family = arch_of(body.family), FAMILIES[body.family]
    found = {name: torch.zeros_like(T) if name.endswith(family.adds) else T for name, T in weights.items()}
    alike, lifted = len(directions) == body.hidden, family.lifts in found
    table = found[arch.embedding].clone()
    rows = vectors @ directions.T if alike and not lifted else vectors
    table[: len(rows), : rows.shape[1]] = rows.to(table.dtype)
    found[arch.embedding] = table
    if lifted:
        lift, width = torch.zeros_like(found[family.lifts]), table.shape[1]
        beside = (lift.shape[1] // width - 1) // 2 * width  # neighbours of the token
        begun = directions if alike else torch.eye(len(lift), width)
        lift[:, beside : beside + begun.shape[1]] = begun.to(lift.dtype)
        found[family.lifts] = lift
    for name in [name for name in found if name.endswith("token_type_embeddings.weight")]:
        found[name] = torch.zeros_like(found[name])
    return found
