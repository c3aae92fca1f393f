"""How wide a model is to be once a share of its blocks' parameters is gone."""

from __future__ import annotations

import math
from dataclasses import replace

from pocketsize.errors import UsageError
from pocketsize.models.model import Model
from pocketsize.models.surgery import Sizes, cut_shape, cuts_of, outlined, sizes_of

# Numbers of inner channels that kernels and grids like, the best first; how far from the share one may lead.
STEPS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
NEAR = 0.01


def block_parameters(model: Model, sizes: Sizes) -> int:
    """The parameters of all blocks of a model of these sizes."""
    inside = f"{model.arch.blocks}."
    names = [name for name in model.checkpoint.entries if name.startswith(inside)]
    return sum(math.prod(cut_shape(model, name, sizes)) for name in names)


def sizes_without(model: Model, share: float) -> Sizes:
    """Sizes of which the blocks have about this share fewer parameters; tokens and head widths stay.

    Inner channels alone go as long as half of them stay: they are two thirds of a block, of the most even
    worth. Beyond that whole groups of heads go with them (where attention is as wide as the model, heads and
    width), about in proportion. Channels are a multiple of the largest step that leads within a hundredth
    of the share.
    """
    own, cuts = sizes_of(model), cuts_of(model)
    left = (1 - share) * block_parameters(model, own)
    found: list[tuple[float, Sizes]] = []
    for groups in range(own.kv_heads, 0, -1) if cuts.heads else (own.kv_heads,):
        body = replace(own, heads=groups * (own.heads // own.kv_heads), kv_heads=groups)
        if cuts.square:
            body = replace(body, hidden=groups * model.head_width)
        if (sizes := _filled(model, body, left)) is None:
            continue
        found.append((abs(groups / own.kv_heads - sizes.ffn / own.ffn), sizes))
        if groups == own.kv_heads and 2 * sizes.ffn >= own.ffn:
            break
    for _, sizes in sorted(found, key=lambda one: one[0]):
        if _possible(model, sizes):
            return sizes
    raise UsageError(
        f"student: remove: {share:g} of the blocks leaves no channel in them; use a smaller share, "
        "or build one: family: llama, bert, ..."
    )


def _possible(model: Model, sizes: Sizes) -> bool:
    """Whether the stock class of the family has a place for these sizes."""
    try:
        outlined(model, sizes)
    except UsageError:
        return False
    return True


def _filled(model: Model, body: Sizes, left: float) -> Sizes | None:
    """A body with as many inner channels as leave so many parameters; None where there is no such number."""
    none, one = (block_parameters(model, replace(body, ffn=n)) for n in (0, 1))
    exact, whole = (left - none) / (one - none), block_parameters(model, sizes_of(model))
    for step in STEPS:
        ffn = round(exact / step) * step
        if 0 < ffn <= body.ffn and abs(none + ffn * (one - none) - left) <= NEAR * whole:
            return replace(body, ffn=ffn)
    return None
