"""The export formats by name: what each can hold, how large it gets, and how it is written and read back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from pocketsize.exporting import compressed_tensors
from pocketsize.exporting.artifact import Artifact
from pocketsize.exporting.behaviour import behaviour_of, field_prints
from pocketsize.exporting.companions import companion_prints
from pocketsize.exporting.gguf import writer as gguf
from pocketsize.exporting.gguf.blocks import BLOCK
from pocketsize.exporting.gguf.blocks import lacks as gguf_lacks
from pocketsize.exporting.reload import reload_check
from pocketsize.exporting.verify import verify_gguf
from pocketsize.models.model import Model
from pocketsize.quantization.scheme import BITS, GROUPS, Scheme

SchemeOf = Callable[[str], Scheme | None]
PARTS: tuple[str, ...] = ("embeddings", "linears", "rest")


@dataclass(frozen=True, slots=True)
class Exporter:
    """An export format.

    `groups` are the group sizes that may be chosen for it, `takes_group` says which it can hold
    when told to, `float_zeros` whether zeros may be other than codes; `lacks` is what it cannot hold of a
    scheme, None if nothing. `refuses` gives the reason why
    a model cannot be exported, or None. `write` makes the artefact in a folder and reads it back;
    `stored` is a parameter as the artefact gives it, `predict_bytes` its exact size before anything
    is written, `tensor_bytes` what each parameter takes of it, `predict_others` the sizes of files that
    come with it, `parts` the bytes of its tensors.
    """

    name: str
    groups: tuple[int, ...]
    bits: tuple[int, ...]
    float_zeros: bool
    takes_group: Callable[[int | None], bool]
    lacks: Callable[[Scheme], str | None]
    refuses: Callable[[Model], str | None]
    write: Callable[[Model, Path], Artifact]
    stored: Callable[[Model, str], Tensor]
    predict_bytes: Callable[[Model, SchemeOf], int]
    tensor_bytes: Callable[[Model, SchemeOf], dict[str, int]]
    predict_others: Callable[[Model, SchemeOf], dict[str, int]]
    parts: Callable[[Model], dict[str, int]]


def behaviours(model: Model, artifacts: Sequence[Artifact]) -> dict[str, object]:
    """The behaviour of each artefact, by its path: what `verify` compares with later."""
    found: dict[str, object] = {}
    for artifact in artifacts:
        known: dict[str, Any] = behaviour_of(model, partial(EXPORTERS[artifact.format].stored, model))
        if artifact.format == "folder":
            known["companions"] = companion_prints(model.folder)
        else:
            kind = gguf.file_type(gguf.plan(model, _schemes(model), "F32"))
            known["fields"] = field_prints(gguf.metadata(model, kind))
        found[artifact.path] = known
    return found


def gguf_name_of(model: Model, scheme_of: SchemeOf | None = None) -> str:
    """The file name of a model's GGUF: its name and the type of most of its weights.

    `scheme_of` stands for weights that are not quantized yet.
    """
    kind = gguf.file_type(gguf.plan(model, scheme_of or _schemes(model), "F32"))
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model.origin.name.rsplit("/", 1)[-1]).strip("-.") or "model"
    return f"{stem}-{kind}.gguf"


def _write_folder(model: Model, folder: Path) -> Artifact:
    artifact = compressed_tensors.write(model, folder)
    return replace(artifact, checks=reload_check(model, folder))


def _write_gguf(model: Model, folder: Path) -> Artifact:
    path = folder / gguf_name_of(model)
    artifact = gguf.write(model, path)
    return replace(artifact, checks=verify_gguf(model, path))


def _folder_parts(model: Model) -> dict[str, int]:
    parts, linears = dict.fromkeys(PARTS, 0), set(model.linears)
    for name, size in compressed_tensors.tensor_bytes(model, _schemes(model)).items():
        parts[_part_of(model, name, linears)] += size
    return parts


def _gguf_parts(model: Model) -> dict[str, int]:
    parts, linears = dict.fromkeys(PARTS, 0), set(model.linears)
    for stored in gguf.plan(model, _schemes(model), "F32"):
        parts[_part_of(model, stored.source, linears)] += stored.bytes
    return parts


def _part_of(model: Model, name: str, linears: set[str]) -> str:
    if name in model.ends:
        return "embeddings"
    return "linears" if name in linears else "rest"


def _schemes(model: Model) -> SchemeOf:
    return lambda name: model.quantized[name].scheme if name in model.quantized else None


EXPORTERS: Mapping[str, Exporter] = MappingProxyType(
    {
        "folder": Exporter(
            name="folder",
            groups=GROUPS,
            bits=BITS,
            float_zeros=False,
            takes_group=lambda _: True,
            lacks=lambda scheme: "float zeros" if scheme.float_zeros else None,
            refuses=lambda _: None,
            write=_write_folder,
            stored=compressed_tensors.stored_value,
            predict_bytes=compressed_tensors.predict_bytes,
            tensor_bytes=compressed_tensors.tensor_bytes,
            predict_others=compressed_tensors.predict_others,
            parts=_folder_parts,
        ),
        "gguf": Exporter(
            name="gguf",
            groups=(BLOCK,),
            bits=(8, 5, 4),
            float_zeros=True,
            takes_group=lambda group: group is None or group % BLOCK == 0,
            lacks=gguf_lacks,
            refuses=gguf.refuses,
            write=_write_gguf,
            stored=gguf.stored_value,
            predict_bytes=gguf.predict_bytes,
            tensor_bytes=gguf.tensor_bytes,
            predict_others=lambda *_: {},
            parts=_gguf_parts,
        ),
    }
)
