"""A conversation with a finished GGUF in llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.io.llamacpp import LlamaCpp

Message = dict[str, str]


def gguf_in(folder: Path) -> Path:
    """The GGUF file of a finished folder, or the file itself."""
    if folder.is_file() and folder.suffix == ".gguf":
        return folder
    found = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if len(found) != 1:
        count = "no" if not found else f"{len(found)}"
        raise UsageError(f"{folder}: {count} GGUF files here; name one, or make one with --target gguf")
    return found[0]


def answer(folder: Path, prompt: str, *, tokens: int, threads: int | None, cache: str | None = None) -> str:
    """One answer to one question; `cache` names the types of keys and values, such as `q8_0`."""
    with _runtime(folder, threads, cache) as runtime:
        return runtime.chat([{"role": "user", "content": prompt}], tokens)


def converse(
    folder: Path,
    *,
    tokens: int,
    threads: int | None,
    cache: str | None = None,
    ask: Callable[[], str],
    tell: Callable[[str], object],
) -> None:
    """Question and answer in turn until the input ends, Ctrl-C, or an empty line or `exit`.

    What no longer fits in the context is forgotten, the oldest question and its answer first.
    """
    messages: list[Message] = []
    with (
        _runtime(folder, threads, cache) as runtime,
        suppress(EOFError, KeyboardInterrupt),
    ):
        while (text := ask().strip()) not in ("", "exit", "quit"):
            fitting = _fitting(runtime, [*messages, {"role": "user", "content": text}], tokens)
            if not fitting:
                tell(f"(too long: question and answer share a context of {runtime.context} tokens)")
                continue
            reply = runtime.chat(fitting, tokens)
            messages = [*fitting, {"role": "assistant", "content": reply}]
            tell(reply)


def _runtime(folder: Path, threads: int | None, cache: str | None) -> LlamaCpp:
    types = None if cache is None else _types(cache)
    return LlamaCpp(gguf_in(folder), threads=threads or os.cpu_count() or 1, cache=types)


def _types(cache: str) -> tuple[str, str]:
    """llama.cpp's types of keys and values by the name of a cache."""
    from pocketsize.quantization.kv import Kivi, parse_cache
    from pocketsize.quantization.kv_blocks import BITS

    found = parse_cache(cache)
    if isinstance(found, Kivi):
        raise UnsupportedError(f"llama.cpp has no cache {found.name}; its types are {', '.join(BITS)}")
    return found.keys, found.values


def _fitting(runtime: LlamaCpp, messages: list[Message], tokens: int) -> list[Message]:
    """The latest messages, a question first, that leave room for an answer; none if the last is too long."""
    room = runtime.context - min(tokens, runtime.context // 2)
    while messages and runtime.chat_tokens(messages) > room:
        messages = messages[2:]
    return messages
