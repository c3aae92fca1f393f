"""How much of what passes through a model is dropped at random while it learns."""

from __future__ import annotations

from torch import nn


def set_dropout(module: nn.Module, share: float) -> None:
    """Let every place of a module that drops activations drop this share of them.

    Some families of transformers have layers for it, others numbers that are read while they work. Whole
    layers that are dropped (`layerdrop`) are none of these; a share of 0 stops them too. Srivastava et al.
    2014, section 4.
    """
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = share
        for name, value in vars(part).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and "drop" in name and (name != "layerdrop" or not share):
                setattr(part, name, share)
