"""Finished artefacts read back: a folder by our own unpacking, a GGUF by the `gguf` package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from pocketsize.errors import DataError, UnsupportedError
from pocketsize.exporting.gguf.names import gguf_name, row_order
from pocketsize.exporting.gguf.writer import main_kind
from pocketsize.exporting.plain_codes import FORMATS, MIXED, from_stored, scheme_in
from pocketsize.io.checkpoint import Checkpoint, Entry, open_checkpoint
from pocketsize.io.gguf.header import read_header
from pocketsize.io.strictjson import read_json_object
from pocketsize.models.arch import Arch, arch_for, arch_of
from pocketsize.models.load import as_module_names
from pocketsize.models.model import Model, Origin
from pocketsize.models.packing import recognise
from pocketsize.models.prequantized import unpacked
from pocketsize.models.quiet import quiet
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.scheme import Scheme
from pocketsize.quantization.unpack import unpack_rows

_PACKED = "_packed"


def read_folder(folder: Path) -> Model:
    """The model in a folder of ours; weights of compressed-tensors are its `quantized`, others unpacked.

    Where it came from is not in the folder, so its `origin` has a name alone.
    """
    path = folder / "config.json"
    raw: dict[str, Any] = read_json_object(path)
    quantization = raw.get("quantization_config", {})
    mixed = quantization.get("format") == MIXED  # of another's writing it is no input
    how = None if mixed else recognise(raw, path)
    raw.pop("quantization_config", None)
    config = _config(raw, path)
    arch = arch_for(config)
    if (
        how is not None and how.method != "compressed-tensors"
    ):  # float4 of compressed-tensors has its own name
        stored = as_module_names(unpacked(open_checkpoint(folder), how, arch), arch)
        return Model(folder, config, arch, Origin(folder.name, "", 0, 0, 0), stored)
    try:
        schemes = _schemes(quantization)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: quantization_config: {error}") from error
    stored = as_module_names(open_checkpoint(folder), arch)
    scales = [name for name in stored.entries if name.endswith(".weight_scale")]
    packed = [name.removesuffix("_scale") for name in scales]
    weights = _Packed(stored, {name: _scheme_of(path, schemes, name) for name in packed}, arch)
    entries = {n: e for n, e in stored.entries.items() if not _is_part(n)} | {
        n: weights.entry(n) for n in packed
    }
    origin = Origin(folder.name, "", 0, 0, 0)
    return Model(folder, config, arch, origin, Checkpoint(folder, MappingProxyType(entries)), weights)


def model_in(gguf: Gguf, config: Mapping[str, Any], names: Iterable[str]) -> Model:
    """The model that a GGUF holds, for a known config and known parameter names; `Gguf.tensor` reads it."""
    made, arch = _config(dict(config), gguf.path), arch_of(str(config.get("model_type")))
    model = Model(
        gguf.path.parent, made, arch, Origin(gguf.path.stem, "", 0, 0, 0), Checkpoint(gguf.path.parent, {})
    )
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in gguf.reader.tensors}
    entries: dict[str, Entry] = {}
    for name in names:
        if (wanted := gguf_name(model, name)) not in shapes:
            raise DataError(f"{gguf.path}: tensor {wanted} is missing")
        entries[name] = Entry(name, gguf.path.name, "F32", shapes[wanted], 0, 0)
    return replace(model, checkpoint=Checkpoint(gguf.path.parent, MappingProxyType(entries)))


class _Packed(Mapping[str, QWeight]):
    """Quantized weights of a folder, unpacked when they are asked for."""

    def __init__(self, stored: Checkpoint, schemes: Mapping[str, Scheme], arch: Arch) -> None:
        self._stored, self._schemes, self._arch = stored, schemes, arch

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes)

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """The scheme of each weight; nothing is read for it."""
        return self._schemes

    def __getitem__(self, name: str) -> QWeight:
        scheme, (rows, columns) = self._schemes[name], self.entry(name).shape
        if scheme.activations:
            scale = self._part(name, "_scale", (rows, 1)).to(torch.float32)
            return from_stored(self._plain(name, scheme), scale, scheme)
        if self._arch.is_transposed(name):
            return self._flipped(name, scheme, rows, columns)
        groups = columns // scheme.width(columns)
        words = -(-columns * scheme.bits // 32), -(-rows * scheme.bits // 32)
        codes = unpack_rows(self._part(name, _PACKED, (rows, words[0])), scheme.bits, columns)
        scale = self._part(name, "_scale", (rows, groups)).to(torch.float32)
        if scheme.symmetric:
            zero = torch.full_like(scale, float(scheme.middle))
        else:
            packed = self._part(name, "_zero_point", (words[1], groups))
            zero = unpack_rows(packed.T.contiguous(), scheme.bits, rows).T.to(torch.float32).contiguous()
        return QWeight(codes, scale, zero, scheme)

    def _flipped(self, name: str, scheme: Scheme, lines: int, across: int) -> QWeight:
        """A matrix that is stored inputs first: a block of inputs has a scale for each output."""
        height = min(scheme.group or lines, lines)
        scheme = replace(scheme, group=None if height == lines else height)
        words = -(-across * scheme.bits // 32)
        codes = unpack_rows(self._part(name, _PACKED, (lines, words)), scheme.bits, across)
        scale = self._part(name, "_scale", (lines // height, across)).to(torch.float32).T.contiguous()
        zero = torch.full_like(scale, float(scheme.middle))
        if not scheme.symmetric:
            zero += self._part(name, "_zero_point", (lines // height, across)).T
        return QWeight(codes.T.contiguous(), scale, zero, scheme)

    def entry(self, name: str) -> Entry:
        """Where the packed codes are, with the shape of the matrix they stand for."""
        if self._schemes[name].activations:
            return self._stored.entries[name]
        shape = self._part(name, "_shape", (2,)).tolist()
        return replace(self._stored.entries[name + _PACKED], name=name, shape=tuple(int(n) for n in shape))

    def _plain(self, name: str, scheme: Scheme) -> Tensor:
        """Codes that lie under the weight's own name, of the type that the scheme says."""
        entry, wanted = self._stored.entries[name], "F8_E4M3" if scheme.floats else "I8"
        if entry.dtype != wanted:
            file = self._stored.folder / entry.file
            raise DataError(f"{file}: tensor {name} is stored as {entry.dtype}; needed: {wanted}")
        return self._stored.read(name)

    def _part(self, name: str, part: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._stored.read(name + part)
        if tuple(tensor.shape) != shape:
            file = self._stored.folder / self._stored.entries[name + part].file
            raise DataError(
                f"{file}: tensor {name}{part} has shape {list(tensor.shape)}, {list(shape)} is needed"
            )
        return tensor


@dataclass(frozen=True, slots=True)
class Gguf:
    """A GGUF file as the `gguf` package reads it."""

    path: Path
    fields: Mapping[str, object]
    kinds: Mapping[str, str]
    reader: GGUFReader

    @property
    def main_kind(self) -> str:
        """The type that holds most weights."""
        return main_kind(
            (t.name, t.tensor_type.name, tuple(int(n) for n in t.shape)) for t in self.reader.tensors
        )

    def tensor(self, model: Model, name: str) -> Tensor:
        """A parameter of `model`, dequantized, float32, rows in the model's own order."""
        wanted = gguf_name(model, name)
        found = next((t for t in self.reader.tensors if t.name == wanted), None)
        if found is None:
            raise DataError(f"{self.path}: tensor {wanted} is missing")
        shape = tuple(int(n) for n in reversed(found.shape))
        if shape != model.checkpoint.entries[name].shape:
            need = list(model.checkpoint.entries[name].shape)
            raise DataError(f"{self.path}: tensor {wanted} has shape {list(shape)}, {need} is needed")
        values = dequantize(found.data, found.tensor_type).reshape(shape)
        W = torch.from_numpy(np.array(values, dtype=np.float32))
        order = row_order(model, name)
        return W if order is None else torch.empty_like(W).index_copy_(0, order, W)


def read_gguf(path: Path) -> Gguf:
    """The file, its header checked first."""
    read_header(path)
    try:
        reader = GGUFReader(path)
        fields = {
            key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
        }
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise DataError(f"{path}: not a readable GGUF: {' '.join(str(error).split())[:200]}") from error
    return Gguf(path, fields, {t.name: t.tensor_type.name for t in reader.tensors}, reader)


def _config(raw: dict[str, Any], path: Path) -> PretrainedConfig:
    try:
        with quiet():
            return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # the config classes raise anything, and all of it means: not a config
        raise DataError(f"{path}: not a config: {' '.join(str(error).split())[:200]}") from error


def _is_part(name: str) -> bool:
    return name.endswith(tuple(".weight" + part for part in (_PACKED, "_scale", "_shape", "_zero_point")))


def _schemes(quantization: Mapping[str, Any]) -> list[tuple[list[str], Scheme]]:
    """Targets and scheme of each group of a `quantization_config`."""
    known = ("pack-quantized", *FORMATS.values(), MIXED)
    if quantization and quantization.get("format") not in known:
        raise UnsupportedError(f"format {quantization.get('format')!r}; read back are {', '.join(known)}")
    found: list[tuple[list[str], Scheme]] = []
    for group in quantization.get("config_groups", {}).values():
        if (own := scheme_in(group)) is not None:
            found.append((group["targets"], own))
            continue
        w = group["weights"]
        height = w["block_structure"][0] if w["strategy"] == "block" else w["group_size"]
        found.append((group["targets"], Scheme(w["num_bits"], height, symmetric=w["symmetric"])))
    return found


def _scheme_of(path: Path, schemes: list[tuple[list[str], Scheme]], name: str) -> Scheme:
    module = name.removesuffix(".weight")
    for targets, scheme in schemes:
        if module in targets or targets in (["Linear"], ["Linear", "Embedding"], ["Conv1D"]):
            return scheme
    raise DataError(f"{path}: tensor {name} is in no group of quantization_config")
