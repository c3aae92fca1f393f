"""A plain folder made of a GGUF file, once: its weights dequantized, its config and tokenizer written out."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import LlamaFileType
from torch import Tensor

from pocketsize.errors import ResourceError, UnsupportedError
from pocketsize.io.checkpoint import SINGLE, TensorSpec, write_safetensors
from pocketsize.io.console import Terminal
from pocketsize.io.gguf.config import DIVISORS, EMBEDDING, HEAD, config_of
from pocketsize.io.gguf.families import Family, family_of
from pocketsize.io.gguf.header import GgufFile, GgufTensor, open_gguf
from pocketsize.io.gguf.tokenizer import settings_of, tokenizer_of
from pocketsize.io.gguf.values import dtype_of, part_of, read_values
from pocketsize.io.hub.copies import Copy, is_copy, read_copy
from pocketsize.io.hub.ids import HubId
from pocketsize.io.publish import clear_leftovers, publish_bytes, sha256_of, staging
from pocketsize.io.source import ORIGIN
from pocketsize.io.strictjson import read_json_object

# Raised when the same file would become another folder.
_VERSION = 1


@dataclass(frozen=True, slots=True)
class _Said:
    """What `origin.json` holds."""

    name: str
    licence: str
    revision: str
    source_bytes: int
    dequantized_from: str


def plain_folder(path: Path, cache: Path) -> Path:
    """The folder below `cache` that a GGUF file has become; it is made when it is not there yet.

    Its name is the hash of the file, so the folder of a file that has changed is another one. A file from
    the hub has one for each commit, which says where it came from.
    """
    file = open_gguf(path)
    family_of(file.of("general.architecture", str), path)
    hashes = [sha256_of(part) for part in file.paths]
    digest = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    copy = read_copy(path.parent) if is_copy(path.parent) else None
    final = cache / f"{digest}-{f'{copy.commit}-' if copy else ''}{_VERSION}"
    if (final / ORIGIN).is_file():
        return final
    clear_leftovers(final)
    _require_room(file, cache)
    with _announced(f"dequantize {path.name}, once"), staging(final) as folder:
        kind = dequantize_folder(file, folder)
        _publish_json(folder / ORIGIN, asdict(_said(file, copy, f"sha256:{digest}", kind)))
    return final


def _said(file: GgufFile, copy: Copy | None, revision: str, kind: str) -> _Said:
    """Where the weights came from: the hub's repository and commit, or what the file says of itself."""
    licence = file.get("general.license", str)
    if copy is None:
        name = file.get("general.name", str) or file.path.stem
    else:
        name, revision = str(HubId(copy.repo, None, copy.file)), copy.commit
        licence = read_json_object(file.path.parent / ORIGIN).get("licence") or licence
    return _Said(str(name), str(licence or "unknown"), revision, file.bytes, kind)


@contextmanager
def _announced(what: str) -> Iterator[None]:
    """Says on a terminal what takes its time."""
    terminal = Terminal()
    terminal.phase(what)
    try:
        yield
    finally:
        terminal.end()


def dequantize_folder(file: GgufFile, out: Path) -> str:
    """Fill the folder `out` from a GGUF file; gives the name of the format that was dequantized.

    A tensor is float32 there, or in its own type where that is a float. One is in memory at a time.
    """
    family = family_of(file.of("general.architecture", str), file.path)
    tied = _is_tied(file)
    config = config_of(file, family, tied=tied)
    rows = int(config["vocab_size"])
    positions = file.of(f"{family.name}.context_length", int)
    _publish_json(out / "config.json", config)
    _publish_json(out / "generation_config.json", _generation(file, config))
    _publish_json(out / "tokenizer.json", tokenizer_of(file, rows))
    _publish_json(out / "tokenizer_config.json", settings_of(file, rows, positions))
    specs = [spec for tensor in file.tensors.values() for spec in _specs(file, tensor, family, config)]
    write_safetensors(out / SINGLE, sorted(specs, key=_running_order), {"format": "pt"})
    return f"GGUF {kind_of(file)}"


def kind_of(file: GgufFile) -> str:
    """What the file calls its type, or else the type of most of its weights."""
    number = file.get("general.file_type", int)
    if number is not None and number in set(LlamaFileType):
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    weights: dict[str, int] = {}
    for tensor in file.tensors.values():
        weights[tensor.kind] = weights.get(tensor.kind, 0) + math.prod(tensor.shape)
    return max(weights, key=lambda kind: weights[kind])


def _is_tied(file: GgufFile) -> bool:
    """Whether the head is the embedding: not stored, or the same bytes once more."""
    if HEAD not in file.tensors or EMBEDDING not in file.tensors:
        return HEAD not in file.tensors
    a, b = file.tensors[HEAD], file.tensors[EMBEDDING]
    return (a.kind, a.shape) == (b.kind, b.shape) and torch.equal(read_values(a), read_values(b))


def _generation(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Special tokens; the end of a turn ends an answer too, where it is a token of its own."""
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    turn = file.get("tokenizer.ggml.eot_token_id", int)
    if turn is not None and 0 <= turn < config["vocab_size"] and turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [*([ids["eos_token_id"]] if "eos_token_id" in ids else []), turn]
    return {"_from_model_config": True} | ids


def _specs(file: GgufFile, tensor: GgufTensor, family: Family, config: dict[str, Any]) -> list[TensorSpec]:
    """What a tensor of the file becomes, under Hugging Face names; it is read when it is written."""
    if tensor.name == DIVISORS or (tensor.name == HEAD and config["tie_word_embeddings"]):
        return []
    block, module, suffix = _split(tensor.name)
    path = family.outer.get(module) if block is None else family.inner.get(module)
    if path is None:
        raise UnsupportedError(f"{file.path}: tensor {tensor.name} has no place in a {family.model_type}")
    name = f"{path}.{suffix}" if block is None else f"{family.blocks}.{block}.{path}.{suffix}"
    if "*" in name:
        count = int(config["num_experts"])
        if len(tensor.shape) != 3 or tensor.shape[0] != count:
            shape = list(tensor.shape)
            raise UnsupportedError(f"{file.path}: tensor {tensor.name} has shape {shape} for {count} experts")
        parts = [(name.replace("*", str(i)), part_of(tensor, i)) for i in range(count)]
        return [TensorSpec(n, dtype_of(part), part.shape, partial(read_values, part)) for n, part in parts]
    return [_spec(name, tensor, module, family, config)]


def _spec(name: str, tensor: GgufTensor, module: str, family: Family, config: dict[str, Any]) -> TensorSpec:
    """A tensor that becomes one; turned, un-rotated or shifted as its family has it."""
    shape, dtype = tensor.shape, dtype_of(tensor)
    if module in family.transposed and len(shape) == 2:
        return TensorSpec(name, dtype, shape[::-1], lambda: read_values(tensor).T)
    if module in family.rotated:
        key = "num_attention_heads" if module == "attn_q" else "num_key_value_heads"
        heads = int(config[key])
        if shape[0] % (2 * heads):
            raise UnsupportedError(f"{tensor.path}: tensor {tensor.name}: {shape[0]} rows for {heads} heads")
        return TensorSpec(name, dtype, shape, lambda: _halves_apart(read_values(tensor), heads))
    if family.norm_offset and module.endswith("norm"):
        own = torch.float32
        return TensorSpec(name, own, shape, lambda: read_values(tensor).to(own) - family.norm_offset)
    return TensorSpec(name, dtype, shape, partial(read_values, tensor))


def _split(name: str) -> tuple[int | None, str, str]:
    """Number of the block, module and `weight` or `bias` of a tensor's name."""
    found = re.fullmatch(r"(?:blk\.(\d{1,6})\.)?(\w+)\.(weight|bias)", name)
    if found is None:
        return None, name, ""
    return (None if found[1] is None else int(found[1])), found[2], found[3]


def _halves_apart(W: Tensor, heads: int) -> Tensor:
    """Rows of each head from GGUF's order, where rotary pairs are neighbours, to halves apart."""
    rows, columns = W.shape
    return W.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _running_order(spec: TensorSpec) -> tuple[int, int, str]:
    """Embedding, blocks by number, then what follows them."""
    block = re.search(r"\.(?:layers|h)\.(\d+)\.", spec.name)
    place = 1 if block else (0 if "embed" in spec.name or ".wte" in spec.name else 2)
    return place, int(block[1]) if block else 0, spec.name


def _require_room(file: GgufFile, cache: Path) -> None:
    """Refuses when the disk has no room for the folder; it is left alone where that cannot be told."""
    needed = sum(math.prod(t.shape) * dtype_of(t).itemsize for t in file.tensors.values())
    place = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ResourceError(
            f"{file.path}: dequantized it has {needed} bytes, {place} has {free} free; make room there, or "
            "set POCKETSIZE_CACHE to a folder on another disk"
        )


def _publish_json(path: Path, value: dict[str, Any]) -> None:
    publish_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
