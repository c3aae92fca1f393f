"""A second device, on the CPU: what lies there meets nothing that lies elsewhere, as on a GPU.

Its tensors are shells around tensors of the CPU, and every operation is run on what they hold. One that
takes tensors of both devices is refused. `install` changes torch for the rest of its process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "second"
COPIES = ("aten::copy_", "aten::_to_copy")


class Shell(Tensor):
    """A tensor of the second device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Shell:
        with torch.inference_mode(False):  # a view of an ordinary tensor is an ordinary one there too
            made = Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=torch.device(NAME, 0),
            )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in given if isinstance(x, Shell)]
        name = func._schema.name
        if name not in COPIES and any(x.ndim and not isinstance(x, Shell) for x in given):
            raise RuntimeError(f"{name}: tensors on two devices: {[str(x.device) for x in given]}")
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if target is not None:
            kwargs["device"] = torch.device("cpu") if target.type == NAME else target
        plain_args, plain_kwargs = pytree.tree_map_only(Shell, lambda x: x.held, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if func._schema.is_mutable and name.endswith("_"):
            return args[0]
        if target is not None and target.type != NAME:
            return out
        known = {id(x.held): x for x in here}
        return pytree.tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else Shell(x), out)


FACTORIES = (
    *("empty.memory_format", "empty_strided", "eye", "eye.m", "scalar_tensor"),
    *("arange", "arange.start", "arange.start_step", "linspace", "full"),
)
_libraries: list[torch.library.Library] = []  # what is registered lasts as long as they do


class _Backend(_DummyBackendModule):
    """What torch asks a device for; autocast has no rules for this one."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def install() -> torch.device:
    """Make torch know the device; gives it."""
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")

        def make(*args: Any, _operator: Any = operator, **options: Any) -> Tensor:
            return Shell(_operator(*args, **options | {"device": torch.device("cpu")}))

        library.impl(name, make)

    def copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        into, of = (x.held if isinstance(x, Shell) else x for x in (target, source))
        into.copy_(of)
        return target

    library.impl("_copy_from", copy)
    _libraries.append(library)
    return torch.device(NAME, 0)
