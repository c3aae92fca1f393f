"""A model as a folder that stock transformers loads: compressed-tensors, most of it `pack-quantized`.

Codes are stored signed (code - 2^(bits-1)) and packed densely: weight i of a row takes bits
i * bits to (i + 1) * bits - 1 of a stream of little-endian 32-bit words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pocketsize.errors import UnsupportedError
from pocketsize.exporting import fp4, plain_codes
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
from pocketsize.io.checkpoint import TensorSpec
from pocketsize.models.arch import Arch
from pocketsize.models.model import Model
from pocketsize.models.skeleton import skeleton
from pocketsize.quantization.pack import pack_rows
from pocketsize.quantization.scheme import Scheme

_DIGITS_OF_FP16 = 11


def write(model: Model, out: Path) -> Artifact:
    """Write the model's weights, config and companion files into the folder `out`.

    Linears keep their own codes, scales and zeros, and so do embedding and head where all of them have
    the one scheme (`packed_schemes`). Everything else is stored in `model.dtype`, from the original
    weights even where `model` has them quantized. A tied head is not stored.
    """
    schemes = packed_schemes(model, own_schemes(model))
    configs = {CONFIG: config_bytes(model, schemes)}
    return write_folder(model, out, "folder", _all_specs(model, schemes), configs)


def predict_bytes(model: Model, scheme_of: SchemeOf) -> int:
    """The exact size of the weight files that `write` would make with these schemes."""
    return weight_bytes(_all_specs(model, packed_schemes(model, scheme_of)))


def predict_others(model: Model, scheme_of: SchemeOf) -> dict[str, int]:
    """The exact sizes of the other files that `write` would make: config, index, companions."""
    packed = packed_schemes(model, scheme_of)
    return other_bytes(model, _all_specs(model, packed), {CONFIG: config_bytes(model, packed)})


def packed_schemes(model: Model, scheme_of: SchemeOf) -> dict[str, Scheme]:
    """What the folder packs, and how: the quantized linears, perhaps embedding and head.

    Stock transformers packs no embedding, but it unpacks one as it loads, which it does with one scheme
    alone: that of the linears.
    """
    found = {name: scheme for name in model.linears if (scheme := scheme_of(name)) is not None}
    ends = {name: scheme for name in model.ends if (scheme := scheme_of(name)) is not None}
    one = len({*found.values(), *ends.values()}) == 1 and not any(s.codebook for s in found.values())
    return found | ends if found and one and not model.arch.dense_on_load else found


def config_bytes(model: Model, schemes: Mapping[str, Scheme]) -> bytes:
    """The original's config, with the dtype of the folder and how its weights are packed."""
    return plain_config(model, quantization_config(model, schemes) if schemes else None)


def tensor_bytes(model: Model, scheme_of: SchemeOf) -> dict[str, int]:
    """The bytes that each parameter takes in the weight files that `write` would make."""
    schemes = packed_schemes(model, scheme_of)
    return {name: sum(map(size_of, _specs(model, name, schemes))) for name in model.checkpoint.entries}


def stored_value(model: Model, name: str) -> Tensor:
    """The parameter as the folder gives it back, float32."""
    linear = name in model.quantized and name not in model.ends
    if linear or name in packed_schemes(model, own_schemes(model)):
        return model.weight(name)
    return kept(model, name).to(torch.float32)


def quantization_config(model: Model, schemes: Mapping[str, Scheme]) -> dict[str, object]:
    """The `quantization_config` of a config.json: one group of layers for each scheme.

    With a single scheme the target is every Linear, and those left alone are listed; several
    schemes name their layers. The modules that stock classes add (poolers) are always left alone.
    """
    modules = {name.removesuffix(".weight"): scheme for name, scheme in schemes.items()}
    flip, ends = model.arch.transposed, not schemes.keys().isdisjoint(model.ends)
    dense = ends or model.arch.dense_on_load
    tallest = max(model.matrix_shape(name)[1] for name in schemes)
    linears = [name for name, module in skeleton(model).named_modules() if isinstance(module, nn.Linear)]
    kinds = list(dict.fromkeys(modules.values()))
    groups: dict[str, object] = {}
    for i, kind in enumerate(kinds):
        targets = [name for name, s in modules.items() if s == kind]
        if len(kinds) == 1:
            targets = ["Conv1D"] if flip else ["Linear", *["Embedding"] * ends]
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": fp4.weights(kind) if kind.codebook else _weights(kind, tallest if flip else None),
            "input_activations": plain_codes.input_activations(kind),
            "output_activations": None,
            "format": fp4.FORMATS.get(kind.codebook) or plain_codes.format_of(kind),
        }
    if (reason := mixes(kinds, model.arch)) is not None:
        raise UnsupportedError(reason)
    parts = [f"re:.*{part.removesuffix('.')}\\..*" for part in model.arch.optional if part.endswith(".")]
    return {
        "quant_method": "compressed-tensors",
        "format": fp4.FORMATS.get(kinds[0].codebook) or plain_codes.format_of_all(kinds),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in modules] + parts,
        "kv_cache_scheme": None,
        # Loading packed zeros as they are fails in transformers 5.23: it expects them unpacked.
        # Conv1D, fused experts and embeddings have no packed form there at all. Float4 that is not unpacked
        # as it is loaded becomes bfloat16 later, whatever the model was loaded in.
        **({"dequantize": True} if dense or not all(_packs(kind) for kind in kinds) else {}),
    }


def lacks(scheme: Scheme) -> str | None:
    """What a folder cannot hold of a scheme; None where it holds all of it."""
    if scheme.codebook is not None and scheme.codebook not in fp4.FORMATS:
        return f"the codebook {scheme.name}"
    if scheme.super_blocks:
        return "super-blocks"
    if scheme.floats and not scheme.activations:
        return "float8 weights whose inputs are not rounded"
    return "float zeros" if scheme.float_zeros else None


def mixes(schemes: Sequence[Scheme | None], arch: Arch) -> str | None:
    """Why a folder cannot hold all of these schemes (None: unquantized); None where it can."""
    kinds = [scheme for scheme in schemes if scheme is not None]
    if (reason := fp4.mixes(kinds, arch) or plain_codes.unrounded(kinds, arch)) is not None:
        return reason
    if len({*kinds}) < 2 or (not arch.dense_on_load and all(kind.symmetric for kind in kinds)):
        return None
    way = "use one scheme" if arch.dense_on_load else "use one scheme, or symmetric: true"
    what = "it unpacks a family as it loads" if arch.dense_on_load else "codes have zeros"
    return f"transformers loads one scheme alone when {what}; {way}"


def _packs(kind: Scheme) -> bool:
    """Whether transformers loads linears of a scheme packed."""
    return kind.symmetric and kind.codebook is None


def _weights(kind: Scheme, tallest: int | None) -> dict[str, object]:
    """How weights are stored; `tallest`: the most inputs where matrices are stored inputs first."""
    grid = {"num_bits": kind.bits, "type": plain_codes.type_of(kind), "symmetric": kind.symmetric}
    blocks = {"strategy": "block", "block_structure": [kind.group or tallest, 1]}
    return {**grid, **(_along(kind) if tallest is None else blocks), "dynamic": False, "actorder": None}


def _along(kind: Scheme) -> dict[str, object]:
    """How scales are spread over a matrix with a row for each output."""
    return {"strategy": "channel" if kind.group is None else "group", "group_size": kind.group}


def _all_specs(model: Model, schemes: Mapping[str, Scheme]) -> list[TensorSpec]:
    return [spec for name in model.checkpoint.entries for spec in _specs(model, name, schemes)]


def _specs(model: Model, name: str, schemes: Mapping[str, Scheme]) -> list[TensorSpec]:
    """The tensors that a parameter becomes, where these are packed with these schemes."""
    entry = model.checkpoint.entries[name]
    if (scheme := schemes.get(name)) is None:
        return [kept_spec(model, name, entry.name)]
    if scheme.codebook is not None:
        return fp4.specs(model, name, scheme)
    if scheme.activations:
        return plain_codes.specs(model, name, scheme, lambda kind: _scale(model, name, kind))
    rows, columns = model.matrix_shape(name)
    groups = columns // scheme.width(columns)
    dense = model.arch.dense_on_load or not schemes.keys().isdisjoint(model.ends)
    flip, kind = model.arch.is_transposed(name), _scale_dtype(scheme, dense=dense)
    lines, across = entry.shape
    scales = (groups, rows) if flip else (rows, groups)
    words = (-(-across * scheme.bits // 32), -(-rows * scheme.bits // 32))
    specs = [
        TensorSpec(f"{entry.name}_packed", torch.int32, (lines, words[0]), lambda: _codes(model, name)),
        TensorSpec(f"{entry.name}_scale", kind, scales, lambda: _scale(model, name, kind)),
        TensorSpec(f"{entry.name}_shape", torch.int64, (2,), lambda: torch.tensor([lines, across])),
    ]
    if not scheme.symmetric and flip:
        specs.append(
            TensorSpec(f"{entry.name}_zero_point", torch.int8, scales, lambda: _flipped_zeros(model, name))
        )
    elif not scheme.symmetric:
        specs.append(
            TensorSpec(
                f"{entry.name}_zero_point", torch.int32, (words[1], groups), lambda: _zeros(model, name)
            )
        )
    return specs


def _codes(model: Model, name: str) -> Tensor:
    weight = model.quantized[name]
    return pack_rows(model.as_stored(name, weight.codes), weight.scheme.bits)


def _scale(model: Model, name: str, kind: torch.dtype) -> Tensor:
    return model.as_stored(name, exact(name, model.quantized[name].scale, kind))


def _scale_dtype(scheme: Scheme, *, dense: bool) -> torch.dtype:
    """The smallest type in which transformers computes scale * (code - zero) without rounding.

    A symmetric matrix is unpacked in the type that the model is loaded in. One that has to be unpacked
    while it is loaded (see `quantization_config`) is unpacked in the type of its scales.
    """
    if scheme.symmetric and not dense:
        return torch.bfloat16
    return torch.float16 if scheme.scale_digits + scheme.bits <= _DIGITS_OF_FP16 else torch.float32


def _zeros(model: Model, name: str) -> Tensor:
    weight = model.quantized[name]
    return pack_rows(weight.zero.to(torch.uint8).T.contiguous(), weight.scheme.bits).T.contiguous()


def _flipped_zeros(model: Model, name: str) -> Tensor:
    """Zeros of blocks are not packed, but signed as the codes are."""
    weight = model.quantized[name]
    return (weight.zero - weight.scheme.middle).to(torch.int8).T.contiguous()
