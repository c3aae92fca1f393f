"""A model from a folder, after every one of its tensors has been accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from pocketsize.errors import (
    DataError,
    NumericalError,
    PocketsizeError,
    RefusedError,
    UnsupportedError,
    did_you_mean,
)
from pocketsize.io.checkpoint import SINGLE, Checkpoint, Entry, open_checkpoint
from pocketsize.io.source import GGUF_CACHE, ORIGIN, resolve
from pocketsize.io.strictjson import read_json_object
from pocketsize.linalg import is_finite
from pocketsize.models.arch import Arch, arch_for
from pocketsize.models.config import NAME, read_config, refuse_code
from pocketsize.models.model import Model, Origin
from pocketsize.models.packing import Prequantized, recognise
from pocketsize.models.prequantized import unpacked
from pocketsize.models.probe import probe_tokenizer
from pocketsize.models.quiet import quiet
from pocketsize.models.skeleton import skeleton, stored, tied_names
from pocketsize.models.sparsity import require_some_zeros, require_zeros

_FLOATS = ("F32", "F16", "BF16")
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def load(source: str | Path) -> Model:
    """The model that a folder, a fetched hub id or `sample:NAME` holds; its weights stay on disk.

    Every tensor that the config implies is there with its shape and a float dtype, no other is,
    and all numbers are finite.
    """
    return _opened(source, whole=True)


def described(source: str | Path) -> Model:
    """The same as far as its headers say it: no number was looked at, and nothing of its origin but a name.

    It takes no time, whatever the size of the model.
    """
    return _opened(source, whole=False)


def _opened(source: str | Path, *, whole: bool) -> Model:
    folder = resolve(str(source))
    if folder.parent.name == GGUF_CACHE:
        return _load_named(folder, Path(source).expanduser(), whole=whole)
    return _load(folder, whole=whole)


def _load_named(folder: Path, source: Path, *, whole: bool) -> Model:
    """The model in the folder that the GGUF file `source` has become; errors name the file itself."""
    try:
        return _load(folder, whole=whole)
    except PocketsizeError as error:
        text = str(error).replace(str(folder / SINGLE), str(source)).replace(str(folder), str(source))
        raise type(error)(text) from error


def _load(folder: Path, *, whole: bool) -> Model:
    config = read_config(folder)
    arch = arch_for(config)
    if (folder / _TOKENIZER_FILES[1]).is_file():
        _read_tokenizer_file(folder / _TOKENIZER_FILES[1])
        probe_tokenizer(folder / _TOKENIZER_FILES[1])
    checkpoint = open_checkpoint(folder)
    if (how := recognise(read_json_object(folder / NAME), folder / NAME)) is not None:
        checkpoint = unpacked(checkpoint, how, arch)
    checkpoint = as_module_names(checkpoint, arch)
    checkpoint = _without_copy_of_embedding(checkpoint, config, arch)
    model = Model(folder, config, arch, _no_origin(folder), checkpoint)
    _account(model)
    if not whole:
        return model
    linears = set(model.linears) if model.pattern is not None else ()
    for name in checkpoint.entries:
        _require_sound(model, name, pruned=name in linears)
    require_some_zeros(model)
    return replace(model, origin=_origin(folder, checkpoint, how))


def tokenizer_of(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, from its folder alone."""
    folder = model.folder
    present = [name for name in _TOKENIZER_FILES if (folder / name).exists()]
    if not present:
        raise DataError(f"{folder}: no {' or '.join(_TOKENIZER_FILES)}; copy the tokenizer's files there")
    for name in present:
        _read_tokenizer_file(folder / name)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{folder / present[-1]}: the tokenizer does not load: {reason}") from error
    vocabulary = tokenizer.get_vocab()
    # Gemma 3 has a token for images that its text models cannot embed; no text gives it.
    roles = {getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    idle = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - roles
    highest = max((i for i in vocabulary.values() if i not in idle), default=-1)
    if not vocabulary or (highest >= model.config.vocab_size and not model.outlined):
        rows = model.config.vocab_size
        raise DataError(f"{folder / present[-1]}: token ids up to {highest}, the embedding has {rows} rows")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise DataError(f"{folder / present[-1]}: two tokens have one id")
    # Long documents are cut into windows by us; the length warning would be noise.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def as_module_names(checkpoint: Checkpoint, arch: Arch) -> Checkpoint:
    """The checkpoint with its tensors under the module's names, less tables that loaders compute.

    An entry's own name stays that of the file: what is written later keeps it.
    """
    entries: dict[str, Entry] = {}
    for entry in checkpoint.entries.values():
        name = arch.module_name(entry.name)
        if arch.is_table(name):
            continue
        if name in entries:
            both = f"{entries[name].name} and {entry.name}"
            raise DataError(f"{checkpoint.folder / entry.file}: tensors {both} are both {name}; remove one")
        entries[name] = entry
    return replace(checkpoint, entries=MappingProxyType(entries))


def _read_tokenizer_file(path: Path) -> None:
    """Refuses a tokenizer's file that names code, or a chat template by a path."""
    raw = read_json_object(path, limit_bytes=256 << 20)
    refuse_code(raw, path)
    templates = raw.get("chat_template")
    for template in templates if isinstance(templates, list) else []:
        name = template.get("name") if isinstance(template, dict) else template
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
            raise RefusedError(f"{path}: chat_template {name!r} is not a plain name")


def _without_copy_of_embedding(checkpoint: Checkpoint, config: PretrainedConfig, arch: Arch) -> Checkpoint:
    """The checkpoint less a stored head that the config calls tied, if it is the embedding indeed."""
    entries, head, embedding = checkpoint.entries, arch.head, arch.embedding
    tied = getattr(config, "tie_word_embeddings", False)
    if not tied or head is None or head not in entries or embedding not in entries:
        return checkpoint
    a, b = checkpoint.read(head), checkpoint.read(embedding)
    if a.shape != b.shape or not torch.equal(a, b):
        gap = f" by up to {float((a.float() - b.float()).abs().max()):.3g}" if a.shape == b.shape else ""
        raise DataError(
            f"{checkpoint.folder / entries[head].file}: {head} differs from {embedding}{gap}, "
            f"yet {NAME} ties them; set tie_word_embeddings to false"
        )
    left = {name: entry for name, entry in entries.items() if name != head}
    return replace(checkpoint, entries=MappingProxyType(left))


def _account(model: Model) -> None:
    """Compare what the checkpoint stores with what the config implies, both ways."""
    module = skeleton(model)
    tied = tied_names(module)
    needed = {name: tuple(t.shape) for name, t in stored(module) if name not in tied}
    _require_layout(model, module)
    entries = model.checkpoint.entries
    if missing := [name for name in needed if name not in entries]:
        raise DataError(_missing(model, missing, needed))
    for name, entry in entries.items():
        path = model.folder / entry.file
        if name not in needed:
            if model.arch.is_optional(name):
                continue
            raise DataError(f"{path}: unexpected tensor {name}{_left_over(model, name, needed)}")
        if entry.shape != needed[name]:
            raise DataError(
                f"{path}: tensor {name} has shape {list(entry.shape)}, "
                f"{NAME} implies {list(needed[name])}; one of the two files is of another model"
            )
        if entry.dtype not in _FLOATS:
            raise DataError(f"{path}: tensor {name} is stored as {entry.dtype}; needed: {', '.join(_FLOATS)}")


def _require_layout(model: Model, module: nn.Module) -> None:
    """Refuses configs that give the blocks other linears than the family's literal names."""
    inside = f"{model.arch.blocks}."
    found = {
        f"{name}.weight"
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | Conv1D) and name.startswith(inside)
    }
    named = set(model.linears)
    for word, names in (("no", named - found), ("also", found - named)):
        if names and model.arch.refuses is None:
            raise UnsupportedError(
                f"{model.folder / NAME}: describes a {model.config.model_type} with {word} {min(names)}; "
                "only the published layout of the family is known"
            )


def _missing(model: Model, missing: list[str], needed: Mapping[str, object]) -> str:
    """Which tensors are missing, and which stored one may be meant."""
    entries = model.checkpoint.entries
    name = missing[0]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    if name == model.arch.head:
        return (
            f"{model.folder}: tensor {name} is missing; if the head is the embedding, {NAME} must say "
            "tie_word_embeddings: true"
        )
    spare = [entry for entry in entries if entry not in needed]
    hint = did_you_mean(name, spare) if spare else ""
    hint = hint if "did you mean" in hint else ""
    files = sorted({entry.file for entry in entries.values()})
    where = files[0] if len(files) == 1 else f"{len(files)} files"
    return f"{model.folder / where}: tensor {name}{more} missing{hint or '; fetch the model again'}"


def _left_over(model: Model, name: str, needed: Mapping[str, object]) -> str:
    """Why a tensor may be there that should not: a layer too many, or a name misspelt."""
    found = re.match(re.escape(model.arch.blocks) + r"\.(\d+)\.", name)
    layers = model.config.num_hidden_layers
    if found and int(found[1]) >= layers:
        return f"; {NAME} says num_hidden_layers {layers}"
    hint = did_you_mean(name, needed)
    return hint if "did you mean" in hint else f"; no {model.config.model_type} model has it"


def _require_sound(model: Model, name: str, *, pruned: bool) -> None:
    """Refuse numbers that are not finite, and a linear without the zeros that the config tells of."""
    checkpoint, entry = model.checkpoint, model.checkpoint.entries[name]
    if entry.dtype not in _FLOATS:
        return
    tensor = checkpoint.read(name)
    if is_finite(tensor):
        if pruned:
            require_zeros(model, name, tensor)
        return
    bad = (~torch.isfinite(tensor)).flatten()
    first = int(bad.nonzero()[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape)]
    path, count = checkpoint.folder / entry.file, f"{int(bad.sum())} of {bad.numel()} numbers"
    raise NumericalError(
        f"{path}: tensor {entry.name}: {count} are {_kinds(tensor)}, the first at {index}; "
        "fetch the model again"
    )


def _kinds(tensor: Tensor) -> str:
    found = [("NaN", tensor.isnan()), ("infinite", tensor.isinf())]
    return " or ".join(word for word, where in found if bool(where.any()))


def _no_origin(folder: Path) -> Origin:
    """A stand-in until the tensors are counted and hashed."""
    return Origin(folder.name, "", 0, 0, 0)


def _origin(folder: Path, checkpoint: Checkpoint, how: Prequantized | None) -> Origin:
    """Where the model came from: as `origin.json` says, else from the folder's name and card."""
    parameters = sum(_size(entry) for entry in checkpoint.entries.values() if entry.dtype in _FLOATS)
    size = sum((folder / file).stat().st_size for file in checkpoint.files)
    said = read_json_object(folder / ORIGIN) if (folder / ORIGIN).exists() else {}
    name, revision = _name_of(folder)
    dequantized = said.get("dequantized_from") if how is None or not how.bits else str(how)
    source_bytes = said.get("source_bytes", size)
    if not isinstance(source_bytes, int):
        raise DataError(f"{folder / ORIGIN}: source_bytes is {source_bytes!r}; a number is needed")
    return Origin(
        name=str(said.get("name", name)),
        sha256=checkpoint.sha256(),
        parameters=parameters,
        source_bytes=source_bytes,
        bf16_bytes=2 * parameters,
        licence=str(said.get("licence") or _licence_of(folder)),
        revision=str(said.get("revision", revision)),
        dequantized_from=None if dequantized is None else str(dequantized),
    )


def _size(entry: Entry) -> int:
    return int(torch.Size(entry.shape).numel())


def _name_of(folder: Path) -> tuple[str, str]:
    """Name and revision; a folder of the hub's cache holds both in its path."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/"), folder.name
    return folder.name, ""


def _licence_of(folder: Path) -> str:
    """The licence that the front matter of README.md states."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:20_000]
    except OSError:
        return "unknown"
    front = re.match(r"\A---\n(.*?)\n---", text, re.DOTALL)
    stated = re.search(r"^license:\s*([\w.+-]+)\s*$", front[1], re.MULTILINE) if front else None
    return stated[1] if stated else "unknown"
