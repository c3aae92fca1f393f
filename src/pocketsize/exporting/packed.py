"""What checkpoints of GPTQ and AWQ share: linears of the blocks packed one by one, all else as it is.

Tensors have the module's names, whatever the original calls them: loaders of these formats rename nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pocketsize.exporting.artifact import Artifact
from pocketsize.exporting.plain import (
    CONFIG,
    SchemeOf,
    as_json,
    exact,
    kept,
    kept_spec,
    other_bytes,
    own_schemes,
    plain_config,
    size_of,
    weight_bytes,
    write_folder,
)
from pocketsize.io.checkpoint import TensorSpec
from pocketsize.models.model import Model
from pocketsize.quantization.scheme import Scheme

# The groups that every reader of these formats takes; others differ from reader to reader.
GROUPS = (128, 64, 32)
# GPTQModel loads it as two linears, whatever the checkpoint has.
_SPLIT = "gate_up_proj"


@dataclass(frozen=True, slots=True)
class Packing:
    """A format of packed linears: `parts` are the tensors of one, `config` says how they are packed.

    `beside` is the name of a file that holds the config a second time, None where readers want none.
    """

    name: str
    parts: Callable[[Model, str, Scheme], Iterator[TensorSpec]]
    config: Callable[[Model, Mapping[str, Scheme]], Mapping[str, object]]
    beside: str | None = None


def write(packing: Packing, model: Model, out: Path) -> Artifact:
    """Write the model's weights, configs and companion files into the folder `out`.

    Linears keep their own codes, scales and zeros; everything else is stored in `model.dtype`, from the
    original weights even where `model` has them quantized. A tied head is not stored.
    """
    schemes = _packed(model, own_schemes(model))
    specs = _specs(packing, model, schemes)
    return write_folder(model, out, packing.name, specs, _configs(packing, model, schemes))


def predict_bytes(packing: Packing, model: Model, scheme_of: SchemeOf) -> int:
    """The exact size of the weight files that `write` would make with these schemes."""
    return weight_bytes(_specs(packing, model, _packed(model, scheme_of)))


def predict_others(packing: Packing, model: Model, scheme_of: SchemeOf) -> dict[str, int]:
    """The exact sizes of the other files that `write` would make: configs, index, companions."""
    schemes = _packed(model, scheme_of)
    return other_bytes(model, _specs(packing, model, schemes), _configs(packing, model, schemes))


def tensor_bytes(packing: Packing, model: Model, scheme_of: SchemeOf) -> dict[str, int]:
    """The bytes that each parameter takes in the weight files that `write` would make."""
    schemes = _packed(model, scheme_of)
    names = model.checkpoint.entries
    return {name: sum(map(size_of, _parameter(packing, model, name, schemes))) for name in names}


def stored_value(model: Model, name: str) -> Tensor:
    """The parameter as the folder gives it back, float32."""
    if name in model.quantized and name not in model.ends:
        return model.weight(name)
    return kept(model, name).to(torch.float32)


def lacks(scheme: Scheme, bits: tuple[int, ...]) -> str | None:
    """What a layout with whole zeros and codes of these widths cannot hold of a scheme."""
    if scheme.codebook is not None:
        return f"the codebook {scheme.name}"
    if scheme.activations:
        return f"rounded inputs ({scheme.name})"
    if scheme.bits not in bits:
        return f"{scheme.bits}-bit codes"
    if scheme.group not in (*GROUPS, None):
        return f"groups of {scheme.group}"
    return "float zeros" if scheme.float_zeros else None


def scales(model: Model, name: str, scheme: Scheme, stored_as: str) -> TensorSpec:
    """The scales of a linear, a row for each group of inputs, float16."""
    rows, columns = model.matrix_shape(name)
    shape = (columns // scheme.width(columns), rows)

    def values() -> Tensor:
        return exact(name, model.quantized[name].scale, torch.float16).T.contiguous()

    return TensorSpec(stored_as, torch.float16, shape, values)


def one_for_all(kinds: Sequence[Scheme | None]) -> str | None:
    """Why a config that has one scheme cannot say these; None where it can."""
    found = {*kinds} - {None}
    return "its config has one scheme for all linears; use one, or export folder" if len(found) > 1 else None


def unpackable(model: Model, *, rows: int, columns: int, encoders: bool = False) -> str | None:
    """Why readers have no place for this model's packed linears; None where they have.

    `rows` and `columns` must divide outputs and inputs of each linear; `encoders`: readers know these too.
    """
    if model.arch.task != "generate" and not encoders:
        return f"its readers know no encoders such as {model.config.model_type}; use folder"
    if model.arch.experts is not None:
        return f"its readers have no packed form for the experts of {model.config.model_type}; use folder"
    for name in model.linears:
        out, width = model.matrix_shape(name)
        if out % rows or width % columns:
            need = f"{rows} outputs" + (f" and {columns} inputs" if columns > 1 else "")
            return f"it packs multiples of {need}, and {name} has {out} outputs, {width} inputs; use folder"
    return None


def split(model: Model) -> str | None:
    """Why GPTQModel does not find a linear of this model; None where it finds all."""
    if not any(name.endswith(_SPLIT) for name in model.arch.linears):
        return None
    return f"GPTQModel splits {_SPLIT} of {model.config.model_type} and does not find it whole; use folder"


def _packed(model: Model, scheme_of: SchemeOf) -> dict[str, Scheme]:
    return {name: scheme for name in model.linears if (scheme := scheme_of(name)) is not None}


def _configs(packing: Packing, model: Model, schemes: Mapping[str, Scheme]) -> dict[str, bytes]:
    said = packing.config(model, schemes) if schemes else None
    configs = {CONFIG: plain_config(model, said)}
    return configs | ({packing.beside: as_json(said)} if packing.beside and said else {})


def _specs(packing: Packing, model: Model, schemes: Mapping[str, Scheme]) -> list[TensorSpec]:
    return [spec for name in model.checkpoint.entries for spec in _parameter(packing, model, name, schemes)]


def _parameter(packing: Packing, model: Model, name: str, schemes: Mapping[str, Scheme]) -> list[TensorSpec]:
    """The tensors that a parameter becomes."""
    if name in schemes:
        return list(packing.parts(model, name, schemes[name]))
    return [kept_spec(model, name, name)]
