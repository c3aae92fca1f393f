"""Activations that are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

from torch import nn

from pocketsize.errors import UnsupportedError
from pocketsize.models.attention import LearningPanels


def recompute(module: nn.Module) -> None:
    """Let every block of a module of transformers compute its activations again.

    What is computed again has to save what was saved at first, so it runs in the mode of the forward pass: a
    backward pass leaves modes behind. Refuses families of which transformers cannot.
    """
    how = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), LearningPanels())}
    own = cast(Any, module)
    if not own.supports_gradient_checkpointing:
        kind = own.config.model_type
        raise UnsupportedError(f"recompute: transformers keeps all activations of a {kind}; use false")
    # Older versions of transformers know it by another name alone.
    enable = getattr(own, "activation_checkpointing_enable", None) or own.gradient_checkpointing_enable
    enable(how)
