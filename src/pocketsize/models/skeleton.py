"""The module of a model without its weights, and the way weights come into it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from pocketsize.errors import DataError, UnsupportedError
from pocketsize.models.config import NAME
from pocketsize.models.device import CPU
from pocketsize.models.experts import unfuse
from pocketsize.models.grouped import regroup
from pocketsize.models.model import Model
from pocketsize.models.quiet import quiet

AUTO = MappingProxyType(
    {
        "generate": AutoModelForCausalLM,
        "classify": AutoModelForSequenceClassification,
        "embed": AutoModel,
    }
)


def skeleton(model: Model, device: torch.device = CPU) -> nn.Module:
    """The model's module with every stored tensor on the meta device.

    Tables that no checkpoint stores (rotary frequencies, position numbers) are on `device`. An optional
    part that the checkpoint lacks (the pooler of a sentence encoder) is taken out.
    """
    auto = AUTO[model.arch.task]
    config = copy.deepcopy(model.config)  # from_config writes into it
    try:
        with quiet(), torch.device("meta"):
            # None: sdpa where the family has it (MPNet has not), whatever the config says.
            module = auto.from_config(
                config, attn_implementation=None, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # any class: the config does not describe a model of its family
        raise DataError(f"{model.folder / NAME}: {' '.join(str(error).split())[:200]}") from error
    for part in model.arch.optional:
        name = part.removesuffix(".")
        if hasattr(module, name) and not any(entry.startswith(part) for entry in model.checkpoint.entries):
            setattr(module, name, None)
    unfuse(module, model.arch)
    regroup(module)
    _compute_tables(module, device)
    module.requires_grad_(False)
    return module.eval()


def fill(module: nn.Module, prefix: str, read: Callable[[str], Tensor], device: torch.device = CPU) -> None:
    """Give each stored tensor at or below the path `prefix` ("" for all) what `read` makes of its name.

    Tensors are assigned, copied only where they are not on `device`. A tied tensor is read once and stays
    tied.
    """
    tied = tied_names(module)
    found = False
    for name, old in _below(module, prefix):
        found = True
        if name in tied:
            continue
        new = read(name).to(device)
        if new.shape != old.shape:
            raise DataError(f"{name}: shape {tuple(new.shape)}, the model needs {tuple(old.shape)}")
        assign(module, name, new, parameter=isinstance(old, nn.Parameter))
    if not found:
        raise ValueError(f"no tensor is named {prefix}, or is below it")
    for name, source in tied.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, module.get_parameter(source))


def _below(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """What is stored at or below a path; the rest of the module is not gone through."""
    owner, _, attribute = prefix.rpartition(".")
    part = getattr(module.get_submodule(owner), attribute, None) if prefix else module
    if isinstance(part, Tensor):
        yield prefix, part
    elif isinstance(part, nn.Module):
        yield from ((f"{prefix}.{name}".lstrip("."), tensor) for name, tensor in stored(part))


def materialise(model: Model, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> nn.Module:
    """The whole model in memory, with its quantized weights dequantized."""
    module = skeleton(model, device)
    fill(module, "", lambda name: model.weight(name).to(dtype), device)
    return module


def stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of everything that a checkpoint stores, tied tensors under each name."""
    yield from list(module.named_parameters(remove_duplicate=False))
    for name, buffer, persistent in _buffers(module):
        if persistent:
            yield name, buffer


def tied_names(module: nn.Module) -> dict[str, str]:
    """Names of tensors that are another one, with the name of that one."""
    return dict(getattr(module, "all_tied_weights_keys", {}))


def assign(module: nn.Module, name: str, tensor: Tensor, *, parameter: bool = True) -> None:
    """Put a tensor where `name` is below the module."""
    owner, _, attribute = name.rpartition(".")
    value = nn.Parameter(tensor, requires_grad=False) if parameter else tensor
    setattr(module.get_submodule(owner), attribute, value)


def _buffers(module: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """Name, tensor, and whether a checkpoint stores it, of each buffer."""
    found = []
    for path, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            persistent = name not in owner._non_persistent_buffers_set
            found.append((f"{path}.{name}" if path else name, buffer, persistent))
    return found


@torch.no_grad()
def _compute_tables(module: nn.Module, device: torch.device) -> None:
    """Give buffers that no checkpoint stores the values that the family's own code gives them."""
    tables = [name for name, buffer, persistent in _buffers(module) if not persistent and buffer.is_meta]
    for name in tables:
        assign(module, name, _unset(module.get_buffer(name)), parameter=False)
    for path in dict.fromkeys(name.rpartition(".")[0] for name in tables):
        module._init_weights(module.get_submodule(path))  # type: ignore[operator]
    for name in tables:
        table = module.get_buffer(name)
        if bool((table == _mark(table)).any() if not table.is_floating_point() else table.isnan().any()):
            raise UnsupportedError(f"{name}: transformers does not say how this table is computed")
        assign(module, name, table.to(device), parameter=False)


def _unset(like: Tensor) -> Tensor:
    """A tensor in memory of which every element is one that no table holds."""
    return torch.full(like.shape, _mark(like), dtype=like.dtype, device="cpu")


def _mark(like: Tensor) -> float | int:
    """NaN, or for whole numbers the least one."""
    return float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).min
