"""What modules inside a model give and read, as its forward pass runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pocketsize.models.model import Model


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


def asked_of(model: Model, block: str) -> list[tuple[int, bool]]:
    """How many numbers of each token are kept for each site of an original's `block`, and whether outputs.

    It is what a site reads, or what its linear gives where it is one alone and gives less than it reads.
    """
    found: list[tuple[int, bool]] = []
    for group in model.groups:
        rows, columns = model.matrix_shape(f"{block}.{group.names[0]}.weight")
        outputs = len(group.names) == 1 and rows < columns
        found.append((rows if outputs else columns, outputs))
    return found


@contextmanager
def recorded(linears: Sequence[nn.Module], rooms: Sequence[Tensor], given: Sequence[bool]) -> Iterator[None]:
    """What each of these linears reads, or where it is so said gives, goes into its room, a row a token."""

    def keep(room: Tensor, output: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        filled = 0

        def hook(_: nn.Module, args: tuple[Tensor, ...], told: Any) -> None:
            nonlocal filled
            rows = (told if output else args[0]).flatten(0, -2)
            room[filled : filled + len(rows)] = rows
            filled += len(rows)

        return hook

    parts = zip(linears, rooms, given, strict=True)
    handles = [linear.register_forward_hook(keep(room, output)) for linear, room, output in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
