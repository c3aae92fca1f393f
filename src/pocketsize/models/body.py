"""The part of a module that gives hidden states, and how it is called."""

from __future__ import annotations

from typing import Any, cast

from torch import nn


def body_of(module: nn.Module) -> nn.Module:
    """What lies below the head; the module itself where it has none."""
    prefix = cast(str, module.base_model_prefix)
    return module.get_submodule(prefix) if hasattr(module, prefix) else module


def uncached(body: nn.Module) -> dict[str, bool]:
    """The option that leaves keys and values alone, for families that have it: those that write."""
    return {"use_cache": False} if hasattr(cast(Any, body).config, "use_cache") else {}
