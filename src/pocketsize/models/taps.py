"""What modules inside a model give, as its forward pass runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def tapped(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the modules at these paths gave last, by path; of one that gives several tensors, the first."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, dict):  # a block of SqueezeBERT, channels first
                output = output["feature_map"].transpose(1, 2)
            found[path] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
