"""Finished artefacts, checked against the model they were made from, or against its recorded behaviour."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from pocketsize.errors import IntegrityError, PocketsizeError
from pocketsize.exporting.agreement import agreement
from pocketsize.exporting.behaviour import (
    differences,
    field_prints,
    loaded,
    recorded_ids,
    tensor_print,
    tokenizer_print,
)
from pocketsize.exporting.companions import companion_prints
from pocketsize.exporting.gguf.names import ROPE_FACTORS, gguf_name
from pocketsize.exporting.gguf.writer import FLOATS, metadata, rope_factors, stored_value
from pocketsize.exporting.manifest import check_manifest
from pocketsize.exporting.packed import stored_value as packed_value
from pocketsize.exporting.probes import PROBES, STRINGS
from pocketsize.exporting.read_back import Gguf, model_in, read_folder, read_gguf
from pocketsize.io.hub.copies import faults, is_copy
from pocketsize.io.llamacpp import LlamaCpp, installed
from pocketsize.io.strictjson import read_json_object
from pocketsize.models.load import tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products

RECORD = "record.json"
GGUF = ".gguf"
CONFIG = "config.json"
# What a config says of a folder rather than of the model in it.
OWN_TO_A_FOLDER = {"dtype", "torch_dtype", "quantization_config", "transformers_version", "_name_or_path"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `detail` names file and tensor where something is wrong."""

    name: str
    ok: bool
    detail: str


@quick_products()
def verify_folder(folder: Path, *, llamacpp: bool | None = None) -> list[Check]:
    """Check a finished folder: hashes, weights, tokenizer, behaviour; GGUF files in llama.cpp too.

    `llamacpp` None runs GGUF files where llama.cpp is installed, True insists, False leaves it out. Of a
    model that was fetched the hashes are all there is to check.
    """
    if is_copy(folder):
        problems = list(faults(folder, hashes=True))
        return [Check("files", not problems, "; ".join(problems) or "every file is as it was fetched")]
    problems = check_manifest(folder)
    checks = [Check("files", not problems, "; ".join(problems) or "every file is as it was written")]
    try:
        recorded = _behaviours(folder / RECORD)
    except PocketsizeError as error:
        return [*checks, Check("record", False, str(error))]
    for path, known in sorted(recorded.items()):
        try:
            if path.endswith(GGUF):
                checks += _check_gguf(folder / path, known, llamacpp)
            else:
                checks += _check_folder(folder / path, known)
        except PocketsizeError as error:
            checks.append(Check("gguf" if path.endswith(GGUF) else "weights", False, str(error)))
        except (KeyError, TypeError, ValueError) as error:
            said = f"{folder / RECORD}: the behaviour of {path} is not readable: {error!r}"
            checks.append(Check("record", False, said))
    unknown = {path.name for path in folder.glob("*.gguf")} - recorded.keys()
    return checks + [Check("gguf", False, f"{name}: {RECORD} does not know it") for name in sorted(unknown)]


def require_sound(checks: list[Check]) -> None:
    """Raises IntegrityError with the first thing that is wrong."""
    wrong = [check for check in checks if not check.ok]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise IntegrityError(f"{wrong[0].detail}{more}")


def verify_gguf(model: Model, path: Path) -> tuple[str, ...]:
    """Check a GGUF file against the model it was written from; what was seen, one sentence each.

    Every tensor, read by the `gguf` package, is our own; metadata and tokenizer are the model's;
    llama.cpp, where it is installed, picks our forward's tokens over 32 prompts x 32 tokens.
    """
    file = read_gguf(path)
    parameters = [n for n in model.checkpoint.entries if not model.arch.is_optional(n)]
    for name in parameters:
        if tensor_print(file.tensor(model, name)) != tensor_print(stored_value(model, name)):
            raise IntegrityError(f"{path}: tensor {gguf_name(model, name)} does not hold {name}")
    _require_fields(file, field_prints(metadata(model, file.main_kind)))
    _require_rope_factors(model, file)
    said = [f"all {len(parameters)} tensors, read by the gguf package, are ours"]
    if installed() is None:
        return (*said, "not run in llama.cpp: python -m pip install 'pocketsize[llamacpp]' to check that too")
    tokenizer = tokenizer_of(model)
    ids = [list(tokenizer(text).input_ids) for text in PROBES]
    with _open(file) as runtime:
        for text in filter(None, STRINGS):
            plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            if runtime.tokenize(text) != list(plain):
                raise IntegrityError(
                    f"{path}: llama.cpp cuts {text!r} into other tokens than the model's tokenizer"
                )
        sentence = _agreement(model, file, runtime, ids, tokens=32)
    return (*said, f"llama.cpp cuts {len(STRINGS)} strings as the model's tokenizer does", sentence)


def verify_packed(
    model: Model, folder: Path, value: Callable[[Model, str], Tensor] = packed_value
) -> tuple[str, ...]:
    """Check a GPTQ, AWQ or sparse checkpoint against the model it was written from; what was seen.

    Every tensor, as the reader of such folders unpacks it, is our own: `value` says what was written.
    """
    back = read_folder(folder)
    names = model.checkpoint.entries
    if odd := sorted(names.keys() ^ back.checkpoint.entries.keys()):
        raise IntegrityError(f"{folder}: tensor {odd[0]} is missing, or is not one of the model's")
    for name in names:
        if tensor_print(back.weight(name)) != tensor_print(value(model, name)):
            raise IntegrityError(f"{folder}: tensor {name} does not hold what was written")
    return (f"all {len(names)} tensors, unpacked by our reader of such checkpoints, are ours",)


def _check_folder(folder: Path, known: dict[str, Any]) -> list[Check]:
    model = read_folder(folder)
    problems = [f"{folder}: {p}" for p in differences(known, model, model.weight)]
    found = companion_prints(folder)
    for name, digest in known["companions"].items():
        if found.get(name) != digest:
            problems.append(f"{folder / name}: not what was copied from the original")
    problems += [f"{folder / CONFIG}: {p}" for p in _config_changes(model, known["config"])]
    if tokenizer_print(tokenizer_of(model)) != known["tokenizer"]:
        problems.append(f"{folder}: the tokenizer gives other ids than were recorded")
    said = (
        f"{len(known['tensors'])} tensors, the tokenizer and {len(known['answers'])} answers are as recorded"
    )
    return [Check("weights", not problems, "; ".join(problems) or said)]


def _config_changes(model: Model, recorded: dict[str, Any]) -> Iterator[str]:
    """Keys of the config that no longer have the value they were recorded with."""
    found = json.loads(json.dumps(model.config.to_dict(), default=str))
    own = {key for key in found if key.startswith("_")}  # not recorded: what they do, the answers tell
    for key in sorted((found.keys() | recorded.keys()) - OWN_TO_A_FOLDER - own):
        if found.get(key) != recorded.get(key):
            yield f"{key} is {found.get(key)!r}, recorded was {recorded.get(key)!r}"


def _check_gguf(path: Path, known: dict[str, Any], llamacpp: bool | None) -> list[Check]:
    file = read_gguf(path)
    _require_fields(file, known["fields"])
    model = model_in(file, known["config"], known["tensors"])
    _require_rope_factors(model, file)
    problems = [f"{path}: {p}" for p in differences(known, model, lambda name: file.tensor(model, name))]
    counts = (
        f"{len(known['tensors'])} tensors, {len(known['fields'])} fields, {len(known['answers'])} answers"
    )
    said = f"{path.name}: {counts} are as recorded"
    checks = [Check("gguf", not problems, "; ".join(problems) or said)]
    if not problems and llamacpp is not False and (llamacpp or installed()):
        ids = [recorded_ids(answer) for answer in known["answers"]]
        with _open(file) as runtime:
            checks.append(
                Check("llama.cpp", True, f"{path.name}: {_agreement(model, file, runtime, ids, tokens=16)}")
            )
    return checks


def _require_fields(file: Gguf, expected: dict[str, str]) -> None:
    """The metadata, hashed field by field, must be as expected."""
    found = field_prints(file.fields)
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            what = (
                "missing"
                if key not in found
                else "unknown"
                if key not in expected
                else "not what was written"
            )
            raise IntegrityError(f"{file.path}: metadata {key} is {what}")


def _require_rope_factors(model: Model, file: Gguf) -> None:
    """No tensor beside the parameters, but the rotary factors if the config asks for them."""
    factors, names = rope_factors(model), {gguf_name(model, n) for n in model.checkpoint.entries}
    stored = next((t for t in file.reader.tensors if t.name == ROPE_FACTORS), None)
    same = stored is factors is None
    if stored is not None and factors is not None:
        same = np.array_equal(stored.data, factors.numpy())
    if not same:
        raise IntegrityError(f"{file.path}: tensor {ROPE_FACTORS} is not what the config says")
    if extra := sorted(file.kinds.keys() - names - {ROPE_FACTORS}):
        raise IntegrityError(f"{file.path}: tensor {extra[0]} is not one of the model's")


def _open(file: Gguf) -> LlamaCpp:
    threads = min(os.cpu_count() or 1, torch.get_num_threads())
    return LlamaCpp(file.path, threads=threads, context=512, exact=True)


def _agreement(model: Model, file: Gguf, runtime: LlamaCpp, ids: list[list[int]], *, tokens: int) -> str:
    """llama.cpp against our forward of what the file holds; raises where they differ too much."""
    module = loaded(model, lambda name: file.tensor(model, name))
    found = agreement(runtime, module, ids, tokens=tokens, rounded=_rounded(model, file))
    if not found.holds:
        raise IntegrityError(f"{file.path}: {found.sentence}")
    return found.sentence


def _rounded(model: Model, file: Gguf) -> dict[str, int]:
    """The linears, head included, whose inputs llama.cpp rounds (not those of floats): in what blocks."""
    embedding, head = model.arch.embedding, model.arch.head
    kinds = {
        n: kind for n in model.checkpoint.entries if (kind := file.kinds[gguf_name(model, n)]) not in FLOATS
    }
    if head and model.tied and embedding in kinds:
        kinds[head] = kinds[embedding]
    blocks = {name: GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] for name, kind in kinds.items()}
    return {name.removesuffix(".weight"): block for name, block in blocks.items() if name != embedding}


def _behaviours(path: Path) -> dict[str, dict[str, Any]]:
    """The recorded behaviour of each artefact, by its path."""
    raw: Any = read_json_object(path, limit_bytes=256 << 20).get("behaviour")
    if not isinstance(raw, dict) or not all(isinstance(b, dict) and "tensors" in b for b in raw.values()):
        raise IntegrityError(f"{path}: it holds no behaviour to compare with")
    return raw
