"""What modules inside a model give and read, as its forward pass runs."""

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


@contextmanager
def readings(linears: Sequence[nn.Module], rooms: Sequence[Tensor]) -> Iterator[None]:
    """What each of these linears reads goes into its room, a row a token, call after call."""

    def keep(room: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        filled = 0

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal filled
            rows = args[0].flatten(0, -2)
            room[filled : filled + len(rows)] = rows
            filled += len(rows)

        return hook

    handles = [
        linear.register_forward_pre_hook(keep(room)) for linear, room in zip(linears, rooms, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
