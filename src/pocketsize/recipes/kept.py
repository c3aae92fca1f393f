"""What is computed once and kept in a work folder, by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from pocketsize.io.publish import publish_bytes, sha256_of


def kept_bytes(folder: Path, name: str, what: object, ending: str, make: Callable[[], bytes]) -> bytes:
    """What `make` gives: read from the folder if it was made of the same `what` before and is undamaged."""
    stem = f"{name}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"
    for path in folder.glob(f"{stem}-*.{ending}"):
        if sha256_of(path) == path.stem.removeprefix(f"{stem}-"):
            return path.read_bytes()
    data = make()
    publish_bytes(folder / f"{stem}-{hashlib.sha256(data).hexdigest()}.{ending}", data)
    return data
