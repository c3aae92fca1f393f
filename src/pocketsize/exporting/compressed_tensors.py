"""A model as a folder that stock transformers loads: compressed-tensors, `pack-quantized`.

Codes are stored signed (code - 2^(bits-1)) and packed densely: weight i of a row takes bits
i * bits to (i + 1) * bits - 1 of a stream of little-endian 32-bit words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int32, UInt8
from torch import Tensor, nn

from pocketsize.errors import NumericalError, UnsupportedError
from pocketsize.exporting.artifact import Artifact
from pocketsize.exporting.companions import companions, copy_companions
from pocketsize.io.checkpoint import DTYPES, INDEX, SINGLE, TensorSpec, file_bytes, write_safetensors
from pocketsize.io.publish import publish_bytes
from pocketsize.io.strictjson import read_json_object
from pocketsize.models.arch import Arch
from pocketsize.models.model import Model
from pocketsize.models.prequantized import KEYS
from pocketsize.models.skeleton import skeleton
from pocketsize.quantization.scheme import Scheme

SHARD_BYTES = 4_000_000_000
_METADATA = {"format": "pt"}
_DIGITS_OF_FP16 = 11

SchemeOf = Callable[[str], Scheme | None]


def write(model: Model, out: Path) -> Artifact:
    """Write the model's weights, config and companion files into the folder `out`.

    Linears keep their own codes, scales and zeros, and so do embedding and head where all of them have
    the one scheme (`packed_schemes`). Everything else is stored in `model.dtype`, from the original
    weights even where `model` has them quantized. A tied head is not stored.
    """
    schemes = packed_schemes(model, _own_schemes(model))
    shards = _shards([spec for name in model.checkpoint.entries for spec in _specs(model, name, schemes)])
    files = {
        file: write_safetensors(out / file, specs, _METADATA)
        for file, specs in zip(_names(len(shards)), shards, strict=True)
    }
    size = sum((out / file).stat().st_size for file in files)
    if len(shards) > 1:
        files[INDEX] = publish_bytes(out / INDEX, _index(shards))
    files["config.json"] = publish_bytes(out / "config.json", config_bytes(model, schemes))
    files |= copy_companions(model.folder, out)
    return Artifact(".", "folder", size, files)


def predict_bytes(model: Model, scheme_of: SchemeOf) -> int:
    """The exact size of the weight files that `write` would make with these schemes."""
    return sum(file_bytes(shard, _METADATA) for shard in _predicted(model, scheme_of))


def predict_others(model: Model, scheme_of: SchemeOf) -> dict[str, int]:
    """The exact sizes of the other files that `write` would make: config, index, companions."""
    packed = packed_schemes(model, scheme_of)
    sizes = {name: (model.folder / name).stat().st_size for name in companions(model.folder)}
    sizes["config.json"] = len(config_bytes(model, packed))
    if len(shards := _predicted(model, scheme_of)) > 1:
        sizes[INDEX] = len(_index(shards))
    return sizes


def packed_schemes(model: Model, scheme_of: SchemeOf) -> dict[str, Scheme]:
    """What the folder packs, and how: the quantized linears, perhaps embedding and head.

    Stock transformers packs no embedding, but it unpacks one as it loads, which it does with one scheme
    alone: that of the linears.
    """
    found = {name: scheme for name in model.linears if (scheme := scheme_of(name)) is not None}
    ends = {name: scheme for name in model.ends if (scheme := scheme_of(name)) is not None}
    one = len({*found.values(), *ends.values()}) == 1
    return found | ends if found and one and not model.arch.dense_on_load else found


def config_bytes(model: Model, schemes: Mapping[str, Scheme]) -> bytes:
    """The original's config, with the dtype of the folder and how its weights are packed."""
    config = read_json_object(model.folder / "config.json")
    for key in ("torch_dtype", *KEYS):
        config.pop(key, None)
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    if schemes:
        config["quantization_config"] = quantization_config(model, schemes)
    return _json(config)


def require_storable(model: Model) -> None:
    """Refuses values beyond `model.dtype` in a tensor that no step quantizes, before any work."""
    compressed = set(model.linears)
    for name in model.checkpoint.entries:
        if name not in compressed:
            _kept(model, name)


def tensor_bytes(model: Model, scheme_of: SchemeOf) -> dict[str, int]:
    """The bytes that each parameter takes in the weight files that `write` would make."""
    schemes = packed_schemes(model, scheme_of)
    return {name: sum(map(_bytes, _specs(model, name, schemes))) for name in model.checkpoint.entries}


def stored_value(model: Model, name: str) -> Tensor:
    """The parameter as the folder gives it back, float32."""
    linear = name in model.quantized and name not in model.ends
    if linear or name in packed_schemes(model, _own_schemes(model)):
        return model.weight(name)
    return _kept(model, name).to(torch.float32)


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
            "weights": {
                "num_bits": kind.bits,
                "type": "int",
                "symmetric": kind.symmetric,
                **(
                    {"strategy": "block", "block_structure": [kind.group or tallest, 1]}
                    if flip
                    else _along(kind)
                ),
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    if (reason := one_scheme_alone(kinds, model.arch)) is not None:
        raise UnsupportedError(reason)
    parts = [f"re:.*{part.removesuffix('.')}\\..*" for part in model.arch.optional if part.endswith(".")]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in modules] + parts,
        "kv_cache_scheme": None,
        # Loading packed zeros as they are fails in transformers 5.23: it expects them unpacked.
        # Conv1D, fused experts and embeddings have no packed form there at all.
        **({"dequantize": True} if dense or not all(kind.symmetric for kind in kinds) else {}),
    }


def one_scheme_alone(kinds: Sequence[Scheme], arch: Arch) -> str | None:
    """Why a folder cannot hold all of these schemes; None where it can."""
    if len({*kinds}) < 2 or (not arch.dense_on_load and all(kind.symmetric for kind in kinds)):
        return None
    way = "use one scheme" if arch.dense_on_load else "use one scheme, or symmetric: true"
    what = "it unpacks a family as it loads" if arch.dense_on_load else "codes have zeros"
    return f"transformers loads one scheme alone when {what}; {way}"


def _along(kind: Scheme) -> dict[str, object]:
    """How scales are spread over a matrix with a row for each output."""
    return {"strategy": "channel" if kind.group is None else "group", "group_size": kind.group}


def pack_rows(codes: UInt8[Tensor, "rows columns"], bits: int) -> Int32[Tensor, "rows words"]:
    """The rows of unsigned codes as dense streams of `bits` bits, the last word filled with zeros."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    stream = np.unpackbits(codes.numpy()[:, :, None], axis=2, count=bits, bitorder="little").reshape(rows, -1)
    packed = np.zeros((rows, words * 4), np.uint8)
    packed[:, : -(-columns * bits // 8)] = np.packbits(stream, axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").astype(np.int32, copy=False))


def _own_schemes(model: Model) -> SchemeOf:
    return lambda name: model.quantized[name].scheme if name in model.quantized else None


def _specs(model: Model, name: str, schemes: Mapping[str, Scheme]) -> list[TensorSpec]:
    """The tensors that a parameter becomes, where these are packed with these schemes."""
    entry = model.checkpoint.entries[name]
    if (scheme := schemes.get(name)) is None:
        return [
            TensorSpec(entry.name, _kept_dtype(model, entry.dtype), entry.shape, lambda: _kept(model, name))
        ]
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


def _kept_dtype(model: Model, stored: str) -> torch.dtype:
    return model.dtype if DTYPES[stored].is_floating_point else DTYPES[stored]


def _kept(model: Model, name: str) -> Tensor:
    """A parameter that is not packed, in the model's dtype (whole numbers as they are)."""
    entry = model.checkpoint.entries[name]
    W = model.kept(name)
    kept = W.to(_kept_dtype(model, entry.dtype))
    if kept.is_floating_point() and not bool(kept.isfinite().all()):
        lost, way = ~kept.isfinite(), "bf16 or fp32" if model.dtype == torch.float16 else "fp32"
        raise NumericalError(
            f"{model.folder / entry.file}: tensor {name}: {int(lost.sum())} of its {lost.numel()} values are "
            f"beyond {str(model.dtype).removeprefix('torch.')}, such as {float(W[lost][0]):.3g}; "
            f"use dtype {way}"
        )
    return kept


def _codes(model: Model, name: str) -> Tensor:
    weight = model.quantized[name]
    return pack_rows(model.as_stored(name, weight.codes), weight.scheme.bits)


def _scale(model: Model, name: str, kind: torch.dtype) -> Tensor:
    weight = model.quantized[name]
    stored = weight.scale.to(kind)
    if not torch.equal(stored.to(torch.float32), weight.scale):
        raise UnsupportedError(f"{name}: a scale is not exact in {stored.dtype}; use fewer scale_digits")
    return model.as_stored(name, stored)


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


def _shards(specs: list[TensorSpec]) -> list[list[TensorSpec]]:
    """Tensors in files of at most `SHARD_BYTES` (one that is larger has a file of its own)."""
    shards: list[list[TensorSpec]] = [[]]
    room = SHARD_BYTES
    for spec in specs:
        if _bytes(spec) > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(spec)
        room -= _bytes(spec)
    return shards


def _predicted(model: Model, scheme_of: SchemeOf) -> list[list[TensorSpec]]:
    schemes = packed_schemes(model, scheme_of)
    return _shards([spec for name in model.checkpoint.entries for spec in _specs(model, name, schemes)])


def _names(shards: int) -> list[str]:
    """What the files are called."""
    if shards == 1:
        return [SINGLE]
    return [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]


def _index(shards: list[list[TensorSpec]]) -> bytes:
    """Which file holds each tensor."""
    names = _names(len(shards))
    where = {spec.name: file for file, specs in zip(names, shards, strict=True) for spec in specs}
    total = sum(_bytes(spec) for specs in shards for spec in specs)
    return _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def _bytes(spec: TensorSpec) -> int:
    return int(torch.Size(spec.shape).numel()) * spec.dtype.itemsize


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
