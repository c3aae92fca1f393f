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

from pocketsize.exporting import awq, bitsandbytes, compressed_tensors, gptq, packed, sparse
from pocketsize.exporting.artifact import Artifact
from pocketsize.exporting.behaviour import behaviour_of, field_prints
from pocketsize.exporting.companions import companion_prints
from pocketsize.exporting.gguf import writer as gguf
from pocketsize.exporting.gguf.blocks import BLOCK
from pocketsize.exporting.gguf.blocks import lacks as gguf_lacks
from pocketsize.exporting.packed import Packing
from pocketsize.exporting.plain import SchemeOf, own_schemes
from pocketsize.exporting.reload import reload_check
from pocketsize.exporting.verify import verify_gguf, verify_packed
from pocketsize.io.publish import make_folder
from pocketsize.models.arch import Arch
from pocketsize.models.model import Model
from pocketsize.quantization.scheme import BITS, GROUPS, Scheme

PARTS: tuple[str, ...] = ("embeddings", "linears", "rest")


@dataclass(frozen=True, slots=True)
class Exporter:
    """An export format.

    `groups` are the group sizes that may be chosen for it, `takes_group` says which it can hold
    when told to, `float_zeros` whether zeros may be other than codes; `lacks` is what it cannot hold of a
    scheme, None if nothing, `mixes` why it cannot hold linears of several schemes (None: unquantized) beside
    each other, None if it can. `refuses` gives the reason why a model cannot be exported, or None.
    `is_folder` says whether the artefact is a folder in the `save_pretrained` layout, `packs_ends` whether it
    may hold embedding and head quantized. `write` makes the artefact in a folder and reads it back;
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
    mixes: Callable[[Sequence[Scheme | None], Arch], str | None]
    refuses: Callable[[Model], str | None]
    is_folder: bool
    packs_ends: bool
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
        if EXPORTERS[artifact.format].is_folder:
            known["companions"] = companion_prints(model.folder)
        else:
            kind = gguf.file_type(gguf.plan(model, own_schemes(model)))
            known["fields"] = field_prints(gguf.metadata(model, kind))
        found[artifact.path] = known
    return found


def write_all(model: Model, exports: Sequence[str], out: Path) -> tuple[Artifact, ...]:
    """The artefacts of these exports in an output folder, written and read back."""
    return tuple(_written(model, name, place(name, exports), out) for name in exports)


def place(name: str, exports: Sequence[str]) -> str:
    """The folder of an output that one of its exports is written in.

    One that is a folder itself is the output (`.`): `folder`, else the first of them. Others lie in it
    under their format's name.
    """
    folders = [other for other in exports if EXPORTERS[other].is_folder]
    first = "folder" if "folder" in folders else next(iter(folders), name)
    return name if EXPORTERS[name].is_folder and name != first else "."


def _written(model: Model, name: str, where: str, out: Path) -> Artifact:
    if where == ".":
        return EXPORTERS[name].write(model, out)
    make_folder(out / where)
    artifact = EXPORTERS[name].write(model, out / where)
    files = {f"{where}/{file}": digest for file, digest in artifact.files.items()}
    return replace(artifact, path=where, files=files)


def gguf_name_of(model: Model, scheme_of: SchemeOf | None = None) -> str:
    """The file name of a model's GGUF: its name and the type of most of its weights.

    `scheme_of` stands for weights that are not quantized yet.
    """
    kind = gguf.file_type(gguf.plan(model, scheme_of or own_schemes(model)))
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model.origin.name.rsplit("/", 1)[-1]).strip("-.") or "model"
    return f"{stem}-{kind}.gguf"


def _write_folder(model: Model, folder: Path) -> Artifact:
    artifact = compressed_tensors.write(model, folder)
    return replace(artifact, checks=reload_check(model, folder))


def _write_gguf(model: Model, folder: Path) -> Artifact:
    path = folder / gguf_name_of(model)
    artifact = gguf.write(model, path)
    return replace(artifact, checks=verify_gguf(model, path))


def _write_packed(packing: Packing, model: Model, folder: Path) -> Artifact:
    artifact = packed.write(packing, model, folder)
    return replace(artifact, checks=verify_packed(model, folder))


def _write_sparse(model: Model, folder: Path) -> Artifact:
    artifact = sparse.write(model, folder)
    seen = verify_packed(model, folder, sparse.stored_value)
    return replace(
        artifact, checks=(*seen, "no program but pocketsize reads it: transformers needs a folder")
    )


def _parts(tensor_bytes: Callable[[Model, SchemeOf], dict[str, int]], model: Model) -> dict[str, int]:
    parts, linears = dict.fromkeys(PARTS, 0), set(model.linears)
    for name, size in tensor_bytes(model, own_schemes(model)).items():
        parts[_part_of(model, name, linears)] += size
    return parts


def _gguf_parts(model: Model) -> dict[str, int]:
    parts, linears = dict.fromkeys(PARTS, 0), set(model.linears)
    for stored in gguf.plan(model, own_schemes(model)):
        parts[_part_of(model, stored.source, linears)] += stored.bytes
    return parts


def _part_of(model: Model, name: str, linears: set[str]) -> str:
    if name in model.ends:
        return "embeddings"
    return "linears" if name in linears else "rest"


def _packed(
    packing: Packing,
    *,
    bits: tuple[int, ...],
    lacks: Callable[[Scheme], str | None],
    mixes: Callable[[Sequence[Scheme | None]], str | None],
    refuses: Callable[[Model], str | None],
) -> Exporter:
    """The exporter of a checkpoint whose linears are packed one by one."""
    tensor_bytes = partial(packed.tensor_bytes, packing)
    return Exporter(
        name=packing.name,
        groups=packed.GROUPS,
        bits=bits,
        float_zeros=False,
        takes_group=lambda group: group is None or group in packed.GROUPS,
        lacks=lacks,
        mixes=lambda kinds, _: mixes(kinds),
        refuses=refuses,
        is_folder=True,
        packs_ends=False,
        write=partial(_write_packed, packing),
        stored=packed.stored_value,
        predict_bytes=partial(packed.predict_bytes, packing),
        tensor_bytes=tensor_bytes,
        predict_others=partial(packed.predict_others, packing),
        parts=partial(_parts, tensor_bytes),
    )


EXPORTERS: Mapping[str, Exporter] = MappingProxyType(
    {
        "folder": Exporter(
            name="folder",
            groups=GROUPS,
            bits=BITS,
            float_zeros=False,
            takes_group=lambda _: True,
            lacks=compressed_tensors.lacks,
            mixes=compressed_tensors.mixes,
            refuses=lambda _: None,
            is_folder=True,
            packs_ends=True,
            write=_write_folder,
            stored=compressed_tensors.stored_value,
            predict_bytes=compressed_tensors.predict_bytes,
            tensor_bytes=compressed_tensors.tensor_bytes,
            predict_others=compressed_tensors.predict_others,
            parts=partial(_parts, compressed_tensors.tensor_bytes),
        ),
        "gguf": Exporter(
            name="gguf",
            groups=(BLOCK,),
            bits=(8, 5, 4),
            float_zeros=True,
            takes_group=lambda group: group is None or group % BLOCK == 0,
            lacks=gguf_lacks,
            mixes=lambda *_: None,
            refuses=gguf.refuses,
            is_folder=False,
            packs_ends=True,
            write=_write_gguf,
            stored=gguf.stored_value,
            predict_bytes=gguf.predict_bytes,
            tensor_bytes=gguf.tensor_bytes,
            predict_others=lambda *_: {},
            parts=_gguf_parts,
        ),
        "sparse": Exporter(
            name="sparse",
            groups=GROUPS,
            bits=BITS,
            float_zeros=False,
            takes_group=lambda _: True,
            lacks=sparse.lacks,
            mixes=lambda *_: None,
            refuses=sparse.refuses,
            is_folder=True,
            packs_ends=False,
            write=_write_sparse,
            stored=sparse.stored_value,
            predict_bytes=sparse.predict_bytes,
            tensor_bytes=sparse.tensor_bytes,
            predict_others=sparse.predict_others,
            parts=partial(_parts, sparse.stored_bytes),
        ),
        "gptq": _packed(
            gptq.V1,
            bits=gptq.BITS,
            lacks=partial(gptq.lacks, zeros=False),
            mixes=gptq.mixes,
            refuses=gptq.refuses,
        ),
        "gptq_v2": _packed(
            gptq.V2,
            bits=gptq.BITS,
            lacks=partial(gptq.lacks, zeros=True),
            mixes=gptq.mixes,
            refuses=gptq.refuses,
        ),
        "awq": _packed(
            awq.GEMM,
            bits=awq.BITS,
            lacks=awq.lacks,
            mixes=packed.one_for_all,
            refuses=awq.refuses,
        ),
        "bitsandbytes": _packed(
            bitsandbytes.NF4,
            bits=(),
            lacks=bitsandbytes.lacks,
            mixes=packed.one_for_all,
            refuses=bitsandbytes.refuses,
        ),
    }
)
