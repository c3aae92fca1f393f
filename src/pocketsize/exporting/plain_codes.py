"""Codes of 8 bits that lie in a folder as they are: `int-quantized` and `float-quantized`.

Beside them stands how a linear rounds what it reads, which the loader does as the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pocketsize.io.checkpoint import TensorSpec
from pocketsize.models.arch import Arch
from pocketsize.models.model import Model
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.scheme import NAMED, Scheme

FORMATS = {False: "int-quantized", True: "float-quantized"}
MIXED = "mixed-precision"
_MIDDLE = 128


def format_of(scheme: Scheme) -> str:
    """What compressed-tensors calls the form in which weights of a scheme lie in a folder."""
    return FORMATS[scheme.floats] if scheme.activations else "pack-quantized"


def format_of_all(schemes: Sequence[Scheme]) -> str:
    """The form of a folder that holds all of these."""
    found = {format_of(scheme) for scheme in schemes}
    return found.pop() if len(found) == 1 else MIXED


def type_of(scheme: Scheme) -> str:
    """What kind of number a code is."""
    return "float" if scheme.floats else "int"


def input_activations(scheme: Scheme) -> dict[str, object] | None:
    """How linears of a scheme round what they read, as a config says it; None where they do not."""
    if not scheme.activations:
        return None
    kind = {"num_bits": 8, "type": type_of(scheme), "symmetric": True}
    return kind | {"strategy": "token", "group_size": None, "dynamic": True}


def unrounded(schemes: Sequence[Scheme], arch: Arch) -> str | None:
    """Why what is loaded would not round each token of what it reads; None where it does, or is not to."""
    if not any(scheme.activations for scheme in schemes):
        return None
    if arch.dense_on_load:
        return "transformers unpacks this family as it loads, and would round no inputs; use W8A16"
    if arch.joins:
        return "this family joins texts, of which transformers would round all tokens alike; use W8A16"
    return None


def specs(
    model: Model, name: str, scheme: Scheme, scale: Callable[[torch.dtype], Tensor]
) -> list[TensorSpec]:
    """The tensors that a weight becomes: codes under its own name, and a scale for each row."""
    stored, shape = model.checkpoint.entries[name].name, model.matrix_shape(name)
    kind = torch.float8_e4m3fn if scheme.floats else torch.int8
    return [
        TensorSpec(stored, kind, shape, lambda: as_stored(model.quantized[name])),
        TensorSpec(f"{stored}_scale", torch.bfloat16, (shape[0], 1), lambda: scale(torch.bfloat16)),
    ]


def as_stored(weight: QWeight) -> Tensor:
    """The codes as the format has them: whole numbers around 0, or floats."""
    if weight.scheme.floats:
        return weight.codes.view(torch.float8_e4m3fn)
    return weight.codes.view(torch.int8) ^ -_MIDDLE


def from_stored(codes: Tensor, scale: Float[Tensor, "out 1"], scheme: Scheme) -> QWeight:
    """The weight that codes and scales of a folder stand for."""
    bits: UInt8[Tensor, "out in"] = codes.view(torch.uint8)
    if scheme.floats:
        return QWeight(bits, scale, torch.zeros_like(scale), scheme)
    return QWeight(bits ^ _MIDDLE, scale, torch.full_like(scale, float(_MIDDLE)), scheme)


def scheme_in(group: dict[str, object]) -> Scheme | None:
    """The scheme of a group of a config that was written here, if its codes lie as they are; else None."""
    form = group.get("format")
    if form not in FORMATS.values():
        return None
    return NAMED["FP8" if form == FORMATS[True] else "W8A8"]
