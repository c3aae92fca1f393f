"""A conversation with a finished GGUF in llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pocketsize.errors import UsageError
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


def answer(folder: Path, prompt: str, *, tokens: int, threads: int | None) -> str:
    """One answer to one question."""
    with LlamaCpp(gguf_in(folder), threads=threads or os.cpu_count() or 1) as runtime:
        return runtime.chat([{"role": "user", "content": prompt}], tokens)


def converse(
    folder: Path, *, tokens: int, threads: int | None, ask: Callable[[], str], tell: Callable[[str], object]
) -> None:
    """Question and answer in turn until the input ends or an empty line or `exit` is given."""
    messages: list[Message] = []
    with LlamaCpp(gguf_in(folder), threads=threads or os.cpu_count() or 1) as runtime:
        while True:
            try:
                text = ask().strip()
            except (EOFError, KeyboardInterrupt):
                return
            if text in ("", "exit", "quit"):
                return
            messages.append({"role": "user", "content": text})
            reply = runtime.chat(messages, tokens)
            messages.append({"role": "assistant", "content": reply})
            tell(reply)
