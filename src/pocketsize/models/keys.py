"""Keys and values of a token whose attention is left out: later tokens may attend to it all the same."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from pocketsize.errors import UnsupportedError


def keep_keys(attention: nn.Module, x: Tensor, options: Mapping[str, Any]) -> None:
    """Put the keys and values of `x`, which attention would read, into the cache; nothing without one.

    `options` are what attention is called with: rotary tables and the cache.
    """
    cache = options.get("past_key_values")
    if cache is None:
        return
    own = cast(Any, attention)
    shape = (*x.shape[:-1], -1, own.head_dim)
    K, V = own.k_proj(x).view(shape), own.v_proj(x).view(shape).transpose(1, 2)
    norm = getattr(own, "k_norm", None)
    K = (K if norm is None else norm(K)).transpose(1, 2)
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if turn is None:
        raise UnsupportedError(f"{type(attention).__name__}: does not say how it turns keys")
    _, K = turn(K, K, *options["position_embeddings"])
    cache.update(K, V, own.layer_idx)
