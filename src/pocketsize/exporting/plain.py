"""What all folders of safetensors share: shards and their index, the config, companions, unpacked tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketsize.errors import NumericalError, UnsupportedError
from pocketsize.exporting.artifact import Artifact
from pocketsize.exporting.companions import companions, copy_companions
from pocketsize.io.checkpoint import DTYPES, INDEX, SINGLE, TensorSpec, file_bytes, write_safetensors
from pocketsize.io.publish import publish_bytes
from pocketsize.io.strictjson import read_json_object
from pocketsize.linalg import is_finite
from pocketsize.models.model import Model
from pocketsize.models.packing import KEYS
from pocketsize.quantization.scheme import Scheme

SHARD_BYTES = 4_000_000_000
CONFIG = "config.json"
_METADATA = {"format": "pt"}

SchemeOf = Callable[[str], Scheme | None]


def write_folder(
    model: Model, out: Path, form: str, specs: Sequence[TensorSpec], configs: Mapping[str, bytes]
) -> Artifact:
    """Write these tensors, these configs by their names, and the model's companions into the folder `out`."""
    shards = _shards(specs)
    files = {
        file: write_safetensors(out / file, shard, _METADATA)
        for file, shard in zip(_names(len(shards)), shards, strict=True)
    }
    size = sum((out / file).stat().st_size for file in files)
    if len(shards) > 1:
        files[INDEX] = publish_bytes(out / INDEX, _index(shards))
    files |= {name: publish_bytes(out / name, data) for name, data in configs.items()}
    files |= copy_companions(model.folder, out)
    return Artifact(".", form, size, files)


def weight_bytes(specs: Sequence[TensorSpec]) -> int:
    """The exact size of the weight files that hold these tensors."""
    return sum(file_bytes(shard, _METADATA) for shard in _shards(specs))


def other_bytes(model: Model, specs: Sequence[TensorSpec], configs: Mapping[str, bytes]) -> dict[str, int]:
    """The exact sizes of the other files that `write_folder` would make."""
    sizes = {name: (model.folder / name).stat().st_size for name in companions(model.folder)}
    sizes |= {name: len(data) for name, data in configs.items()}
    if len(shards := _shards(specs)) > 1:
        sizes[INDEX] = len(_index(shards))
    return sizes


def plain_config(model: Model, quantization: Mapping[str, object] | None) -> bytes:
    """The original's config, with the dtype of the folder and how its weights are packed, if they are."""
    config = read_json_object(model.folder / CONFIG)
    for key in ("torch_dtype", *KEYS):
        config.pop(key, None)
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    if quantization is not None:
        config["quantization_config"] = quantization
    return as_json(config)


def config_of_plain(folder: Path) -> dict[str, Any]:
    """The config of a model folder without what it says of how weights are packed: it is for plain ones."""
    return {k: v for k, v in read_json_object(folder / CONFIG).items() if k not in KEYS}


def require_storable(model: Model) -> None:
    """Refuses values beyond `model.dtype` in a tensor that no step quantizes, before any work."""
    compressed = set(model.linears)
    for name in model.checkpoint.entries:
        if name not in compressed:
            kept(model, name)


def kept_spec(model: Model, name: str, stored_as: str) -> TensorSpec:
    """A parameter that is not packed, as a tensor of the folder."""
    entry = model.checkpoint.entries[name]
    return TensorSpec(stored_as, _kept_dtype(model, entry.dtype), entry.shape, lambda: kept(model, name))


def kept(model: Model, name: str) -> Tensor:
    """A parameter that is not packed, in the model's dtype (whole numbers as they are)."""
    entry = model.checkpoint.entries[name]
    W = model.kept(name)
    stored = W.to(_kept_dtype(model, entry.dtype))
    if stored.is_floating_point() and not is_finite(stored):
        lost, way = ~stored.isfinite(), "bf16 or fp32" if model.dtype == torch.float16 else "fp32"
        raise NumericalError(
            f"{model.folder / entry.file}: tensor {name}: {int(lost.sum())} of its {lost.numel()} values are "
            f"beyond {str(model.dtype).removeprefix('torch.')}, such as {float(W[lost][0]):.3g}; "
            f"use dtype {way}"
        )
    return stored


def exact(name: str, scale: Tensor, kind: torch.dtype) -> Tensor:
    """Scales of the parameter `name` in the type they are stored in; refuses what that would change."""
    stored = scale.to(kind)
    if not torch.equal(stored.to(torch.float32), scale):
        raise UnsupportedError(f"{name}: a scale is not exact in {kind}; use fewer scale_digits")
    return stored


def own_schemes(model: Model) -> SchemeOf:
    """The scheme of each parameter that the model has quantized."""
    return model.schemes.get


def size_of(spec: TensorSpec) -> int:
    """The bytes of a tensor."""
    return int(torch.Size(spec.shape).numel()) * spec.dtype.itemsize


def as_json(value: object) -> bytes:
    """A config file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _kept_dtype(model: Model, stored: str) -> torch.dtype:
    return model.dtype if DTYPES[stored].is_floating_point else DTYPES[stored]


def _shards(specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """Tensors in files of at most `SHARD_BYTES` (one that is larger has a file of its own)."""
    shards: list[list[TensorSpec]] = [[]]
    room = SHARD_BYTES
    for spec in specs:
        if size_of(spec) > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(spec)
        room -= size_of(spec)
    return shards


def _names(shards: int) -> list[str]:
    """What the files are called."""
    if shards == 1:
        return [SINGLE]
    return [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]


def _index(shards: list[list[TensorSpec]]) -> bytes:
    """Which file holds each tensor."""
    names = _names(len(shards))
    where = {spec.name: file for file, specs in zip(names, shards, strict=True) for spec in specs}
    total = sum(size_of(spec) for specs in shards for spec in specs)
    return as_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
