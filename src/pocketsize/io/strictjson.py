"""JSON from files of unknown origin: bounded, no key twice, no NaN, and errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path

from pocketsize.errors import DataError, RefusedError, UnsupportedError

# Magic bytes of pickles (protocol 2 and up) and of zip archives, which is how torch stores them.
_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
# What files of llama.cpp began with before GGUF: little-endian words, so their letters stand in reverse.
_ANCESTORS = (b"ggml", b"ggmf", b"ggjt")


def read_json_object(path: Path, *, limit_bytes: int = 16 << 20) -> dict[str, object]:
    """The JSON object in a file."""
    try:
        if not path.is_file():
            raise DataError(f"{path}: {'not a plain file' if path.exists() else 'missing'}")
        if (size := path.stat().st_size) > limit_bytes:
            raise DataError(f"{path}: {size} bytes; at most {limit_bytes} are read")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    return parse_json_object(data, path)


def parse_json_object(data: bytes, path: Path) -> dict[str, object]:
    """The JSON object in `data`, which was read from `path`."""
    refuse_pickle(data, path)
    if not data.strip():
        raise DataError(f"{path}: empty; a JSON object is needed")
    if not data.strip(b"\0"):
        raise DataError(f"{path}: all bytes are zero; fetch it again")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise DataError(f"{path}: JSON nested too deep") from error
    except ValueError as error:
        raise DataError(f"{path}: not sound JSON: {_one_line(str(error))}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: a JSON object is needed, found {type(value).__name__}")
    return value


def refuse_pickle(data: bytes, path: Path) -> None:
    """Refuses content that a pickle reader would run, whatever the file is called."""
    if data.startswith(_PICKLE):
        raise RefusedError(f"{path}: a pickle or zip archive, which can run code; save it as safetensors")


def refuse_ancestor(data: bytes, path: Path) -> None:
    """Refuses the formats of llama.cpp before GGUF, by what their files begin with."""
    if (name := data[:4][::-1]) in _ANCESTORS:
        raise UnsupportedError(
            f"{path}: {name.decode().upper()}, which llama.cpp had before GGUF: take the model's safetensors"
        )


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {_one_line(key)!r} is there twice")
        found[key] = value
    return found


def _no_constant(word: str) -> object:
    raise ValueError(f"{word} is not a JSON number")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:160]
