"""A pruned model as a folder of what is not zero: a bit for each weight says whether it is there.

Weights that are not quantized lie as the `sparse-bitmask` of compressed-tensors has them (releases up to 0.14
read it): NAME.bitmask, bits of each row, its first weight in the lowest; NAME.compressed, what is not
zero, row after row; NAME.row_offsets, where each row begins there; NAME.shape. Of quantized ones the codes of
what is not zero lie in NAME.codes instead, one stream of bits, beside NAME.scale and NAME.zero_point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pocketsize.exporting.artifact import Artifact
from pocketsize.exporting.plain import (
    CONFIG,
    SchemeOf,
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
from pocketsize.io.checkpoint import DTYPES, TensorSpec, open_checkpoint
from pocketsize.models.model import SPARSITY, Model
from pocketsize.models.packing import SPARSE, sparse_said
from pocketsize.pruning.bitmask import bits_of_rows, packed_codes, row_offsets, rows_of_bits, spread
from pocketsize.pruning.mask import zeros_of
from pocketsize.pruning.oats import split
from pocketsize.pruning.pattern import UNSTRUCTURED
from pocketsize.quantization.scheme import Scheme

# How many weights of a linear are not zero.
CountOf = Callable[[str], int]


def refuses(model: Model) -> str | None:
    """Why a model cannot be stored so; None where it can."""
    if model.pattern is None and not model.low_rank:
        return "nothing in the model is pruned: it would only grow; use folder"
    return None


def lacks(scheme: Scheme) -> str | None:
    """What the format cannot hold of a scheme; None where it holds all of it."""
    if scheme.codebook is not None:
        return f"the codebook {scheme.name}"
    if scheme.super_blocks:
        return "super-blocks"
    if scheme.floats:
        return f"floats ({scheme.name})"
    if scheme.activations:
        return f"rounded inputs ({scheme.name})"
    return "float zeros" if scheme.float_zeros else None


def write(model: Model, out: Path) -> Artifact:
    """Write the model's weights, config and companion files into the folder `out`.

    All but the linears is stored in `model.dtype`, from the original weights even where `model` has them
    quantized. A tied head is not stored.
    """
    schemes = _quantized(model, own_schemes(model))
    specs = _all_specs(model, schemes, _counted(model))
    return write_folder(model, out, "sparse", specs, {CONFIG: _config(model, schemes)})


def predict_bytes(model: Model, scheme_of: SchemeOf) -> int:
    """The size of the weight files if as many weights are zero as the pattern says.

    Fewer bytes where quantizing makes more of them zero.
    """
    return weight_bytes(_all_specs(model, _quantized(model, scheme_of), _expected(model)))


def predict_others(model: Model, scheme_of: SchemeOf) -> dict[str, int]:
    """The sizes of the other files that `write` would make."""
    schemes = _quantized(model, scheme_of)
    return other_bytes(model, _all_specs(model, schemes, _expected(model)), {CONFIG: _config(model, schemes)})


def tensor_bytes(model: Model, scheme_of: SchemeOf) -> dict[str, int]:
    """The bytes that each parameter would take if as many weights are zero as the pattern says."""
    return _sizes(model, _quantized(model, scheme_of), _expected(model))


def stored_bytes(model: Model, scheme_of: SchemeOf) -> dict[str, int]:
    """The bytes that each parameter takes, all weights counted."""
    return _sizes(model, _quantized(model, scheme_of), _counted(model))


def stored_value(model: Model, name: str) -> Tensor:
    """The parameter as the folder gives it back, float32."""
    if name in model.quantized and name not in model.ends:
        return model.weight(name)
    if model.low_rank and name in model.linears:
        return _sum(model, name)
    return kept(model, name).to(torch.float32)


def _quantized(model: Model, scheme_of: SchemeOf) -> dict[str, Scheme]:
    return {name: scheme for name in model.linears if (scheme := scheme_of(name)) is not None}


def _config(model: Model, schemes: Mapping[str, Scheme]) -> bytes:
    """What says how the folder is packed: to compressed-tensors where it may know it."""
    known: Mapping[str, object] = getattr(model.config, SPARSITY)
    said = sparse_said(known)["quantization_config"]
    assert isinstance(said, dict)
    if not schemes:
        return plain_config(model, said)
    weights = sorted({(s.bits, s.group or -1, s.symmetric) for s in schemes.values()})
    listed = [{"num_bits": bits, "group_size": group, "symmetric": even} for bits, group, even in weights]
    own = {"quant_method": SPARSE, "weights": listed, "sparsity_config": said["sparsity_config"]}
    return plain_config(model, own)


def _counted(model: Model) -> CountOf:
    """How many weights really are not zero."""

    def count(name: str) -> int:
        W = model.weight(name) if name in model.quantized else kept(model, name)
        return int(W.count_nonzero())

    return count


def _expected(model: Model) -> CountOf:
    """How many weights stay by the model's pattern."""
    pattern = model.pattern
    share = 0.0 if pattern is None else pattern.sparsity

    def count(name: str) -> int:
        weights = math.prod(model.checkpoint.entries[name].shape)
        return weights - zeros_of(weights, share)

    return count


def _sizes(model: Model, schemes: Mapping[str, Scheme], count: CountOf) -> dict[str, int]:
    linears = set(model.linears)
    return {
        name: sum(map(size_of, _specs(model, name, schemes, count if name in linears else None)))
        for name in model.checkpoint.entries
    }


def _all_specs(model: Model, schemes: Mapping[str, Scheme], count: CountOf) -> list[TensorSpec]:
    linears = set(model.linears)
    return [
        spec
        for name in model.checkpoint.entries
        for spec in _specs(model, name, schemes, count if name in linears else None)
    ]


def _specs(
    model: Model, name: str, schemes: Mapping[str, Scheme], count: CountOf | None
) -> Iterator[TensorSpec]:
    """The tensors that a parameter becomes."""
    entry = model.checkpoint.entries[name]
    if count is None:
        yield kept_spec(model, name, entry.name)
        return
    if model.low_rank:
        yield from _parts_of_sum(model, name)
        return
    lines, across = entry.shape
    owner, left, scheme = entry.name.removesuffix(".weight"), count(name), schemes.get(name)

    def mask() -> Tensor:
        return (model.weight(name) if scheme is not None else kept(model, name)) != 0

    yield TensorSpec(f"{owner}.shape", torch.int64, (2,), lambda: torch.tensor([lines, across]))
    yield TensorSpec(f"{owner}.bitmask", torch.uint8, (lines, -(-across // 8)), lambda: bits_of_rows(mask()))
    if scheme is None:
        yield TensorSpec(f"{owner}.compressed", model.dtype, (left,), lambda: kept(model, name)[mask()])
        yield TensorSpec(f"{owner}.row_offsets", torch.int64, (lines,), lambda: row_offsets(mask()))
        return
    rows, columns = model.matrix_shape(name)
    groups, words = columns // scheme.width(columns), -(-left * scheme.bits // 32)
    yield TensorSpec(
        f"{owner}.codes",
        torch.int32,
        (words,),
        lambda: packed_codes(model.as_stored(name, model.quantized[name].codes), mask(), scheme.bits),
    )
    yield TensorSpec(
        f"{owner}.scale",
        torch.bfloat16,
        (rows, groups),
        lambda: exact(name, model.quantized[name].scale, torch.bfloat16),
    )
    if not scheme.symmetric:
        yield TensorSpec(
            f"{owner}.zero_point",
            torch.int32,
            (-(-rows * groups * scheme.bits // 32),),
            lambda: _zeros(model, name, scheme.bits),
        )


def _parts_of_sum(model: Model, name: str) -> Iterator[TensorSpec]:
    """What a linear that is a sum is stored as: the parts as step `oats` left them, or of their shapes."""
    entry = model.checkpoint.entries[name]
    owner = entry.name.removesuffix(".weight")
    raw = open_checkpoint(model.checkpoint.folder)
    for part in ("shape", "bitmask", "compressed", "row_offsets", "left", "right"):
        stored = f"{owner}.{part}"
        if stored in raw.entries:
            shape, plain = raw.entries[stored].shape, DTYPES[raw.entries[stored].dtype]
        else:
            shape, plain = _shape_of(model, name, part)
        dtype = model.dtype if plain.is_floating_point else plain
        yield TensorSpec(stored, dtype, shape, lambda stored=stored, d=dtype: raw.read(stored).to(d))


def _shape_of(model: Model, name: str, part: str) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape of a part before it is there."""
    (rows, columns), (lines, across) = model.matrix_shape(name), model.checkpoint.entries[name].shape
    known = getattr(model.config, SPARSITY)
    rank, sparsity = split(rows, columns, known["share"], known["rank"])
    left = rows * columns
    left -= round((known["share"] if known["structure"] != UNSTRUCTURED else sparsity) * left)
    shapes = {
        "shape": ((2,), torch.int64),
        "bitmask": ((lines, -(-across // 8)), torch.uint8),
        "compressed": ((left,), torch.float32),
        "row_offsets": ((lines,), torch.int64),
        "left": ((rows, rank), torch.float32),
        "right": ((rank, columns), torch.float32),
    }
    return shapes[part]


def _sum(model: Model, name: str) -> Tensor:
    """A linear from its parts as they are stored."""
    parts = {spec.name.rpartition(".")[2]: spec.make() for spec in _parts_of_sum(model, name)}
    across = model.checkpoint.entries[name].shape[1]
    S = spread(parts["compressed"].float(), rows_of_bits(parts["bitmask"], across))
    return S + model.as_stored(name, parts["left"].float() @ parts["right"].float())


def _zeros(model: Model, name: str, bits: int) -> Tensor:
    zero = model.quantized[name].zero.to(torch.uint8)
    return packed_codes(zero, torch.ones_like(zero, dtype=torch.bool), bits)
