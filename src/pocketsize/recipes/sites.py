"""Linears that read the same tensor: what they read, and their weights as one matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from pocketsize.errors import NumericalError
from pocketsize.models.walk import Site
from pocketsize.quantization.grid import QWeight

# What a quantizer can do with a linear that reads nothing but zeros.
UNREAD = "use step rtn"


def what_is_read(site: Site, *, unread: str = UNREAD) -> Float[Tensor, "in in"]:
    """E[x x^T] of a site, the identity where no token reached it; refuses what is all zero, or not finite.

    `unread` is what a user can do about inputs that are all zero.
    """
    columns = site.weights[0].shape[1]
    H = site.gram.mean() if site.gram.tokens else torch.eye(columns, device=site.gram.total.device)
    if lost := int((~H.diagonal().isfinite()).sum()):
        raise NumericalError(
            f"{site.names[0]}: {lost} of its {len(H)} inputs were NaN, infinite or too large to square "
            "for some calibration token; look at the layer before it with `pocketsize inspect`"
        )
    if not bool(H.diagonal().any()):
        raise NumericalError(
            f"{site.names[0]}: all its {len(H)} inputs were zero for every calibration token, so nothing "
            f"can be learned about it; look at the layer before it with `pocketsize inspect`, or {unread}"
        )
    return H


def left_out(site: Site) -> str:
    """How step `prune` leaves the linears of a site as they are."""
    names = ", ".join(f"'{name.removesuffix('.weight')}': null" for name in site.names)
    return f'leave it as it is: --set "overrides={{{names}}}"'


@contextmanager
def naming(site: Site) -> Iterator[None]:
    """What cannot be computed is told with the name of the first linear that it concerns."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{site.names[0]}: {error}") from error


def stacked(site: Site) -> Float[Tensor, "out in"]:
    """All weights of a site as one matrix."""
    return site.weights[0] if len(site.weights) == 1 else torch.cat(site.weights)


def unstacked(weight: QWeight, site: Site) -> Iterator[QWeight]:
    """The parts of a stacked matrix, one for each linear of the site."""
    rows = [w.shape[0] for w in site.weights]
    parts = (t.split(rows) for t in (weight.codes, weight.scale, weight.zero))
    for codes, scale, zero in zip(*parts, strict=True):
        yield QWeight(codes, scale, zero, weight.scheme)
