"""Linears that round what they read, as a runtime with 8-bit activations has them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from pocketsize.quantization.activations import rounded
from pocketsize.quantization.scheme import Scheme

_NONE: Mapping[str, Tensor] = MappingProxyType({})


def round_inputs(
    module: nn.Module, rounds: Mapping[str, Scheme], divisors: Mapping[str, Tensor] = _NONE
) -> None:
    """From now on these linears, by parameter name, round what they read to 8 bits token by token.

    Inputs that have divisors are rounded as those are that are divided by them.
    """
    for name, scheme in rounds.items():
        linear = module.get_submodule(name.removesuffix(".weight"))
        linear.register_forward_pre_hook(partial(_round, name, scheme.floats, divisors))


def _round(
    name: str, floats: bool, divisors: Mapping[str, Tensor], _: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    X, *rest = args
    if name not in divisors:
        return (rounded(X, floats=floats), *rest)
    s = divisors[name].to(X.dtype)
    return (rounded(X / s, floats=floats) * s, *rest)
