"""From what a user types for a model to the folder that holds it."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from pocketsize.errors import DataError, UsageError
from pocketsize.io.hub.copies import find, is_copy, other_ids, require_whole
from pocketsize.io.hub.ids import HubId, is_address, parse_hub
from pocketsize.io.samples import PREFIX, Sample, sample_hint, sample_of
from pocketsize.io.strictjson import refuse_ancestor, refuse_pickle

ORIGIN, GGUF_CACHE = "origin.json", "gguf"
# What a token may leave out of the model beside it as it runs.
GATES = "gates.json"
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


class NotFetchedError(UsageError):
    """A model that is not on this machine yet; `what` is what `pocketsize fetch` is to be given."""

    def __init__(self, said: str, what: str) -> None:
        super().__init__(f"{said}; run: pocketsize fetch {what}")
        self.what = what


def resolve(model: str) -> Path:
    """The folder of a model: a path, what a GGUF file becomes, a sample or hub model that is fetched.

    A local folder comes before a hub id of the same name.
    """
    if not model.strip():
        raise UsageError("the name of the model is empty; give a folder, a GGUF file, a hub id or a sample")
    if model.startswith(PREFIX):
        found = cached(sample_of(model))
        if not (found / ORIGIN).is_file():
            raise NotFetchedError(f"{model} is not on this machine yet", model)
        return found
    path = Path(model).expanduser()
    if not path.exists() and (asked := parse_hub(model)):
        path = _fetched(asked, model)
    if path.is_dir():
        return _of_gguf(inside) if (inside := only_gguf(path)) else path
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(64)
        refuse_pickle(head, path)
        refuse_ancestor(head, path)
    if path.suffix == ".gguf" and path.is_file():
        hub = path.absolute().parent.parent.name == "snapshots"
        return _of_gguf(path.resolve() if path.is_symlink() and not hub else path)
    if path.exists():
        raise UsageError(f"{path}: neither a folder nor a .gguf file; give the folder that holds config.json")
    kinds = "a folder in Hugging Face layout, a GGUF file, a hub id, or a sample"
    raise UsageError(f"{model}: no such folder or file; give {kinds}{sample_hint(model)}")


def fetched_copy(model: str) -> Path | None:
    """The folder of the fetched copy that a hub id or a path means; None where it means another model."""
    path = Path(model).expanduser()
    if not path.exists() and (asked := parse_hub(model)):
        path = _fetched(asked, model)
    folder = path.parent if path.is_file() else path
    return folder if is_copy(folder) else None


def _fetched(asked: HubId, model: str) -> Path:
    """What was fetched under a hub id: a folder, or a GGUF file. Its files have the sizes they came with."""
    folder = find(asked, cache_folder())
    if folder is None:
        where = "" if is_address(model) else "no such folder, and "
        others = other_ids(asked, cache_folder())
        also = f" (fetched are: {', '.join(others)})" if others else ""
        raise NotFetchedError(f"{model}: {where}not fetched from the hub yet{also}", str(asked))
    require_whole(folder, hashes=False)
    return folder / PurePosixPath(asked.file).name if asked.file else folder


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file, or the first part of it, of a folder that holds one and no other weights."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from error
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return None
    whole = [name for name in names if name.endswith(".gguf") and not _LATER_PART.search(name)]
    if len(whole) > 1:
        raise UsageError(f"{folder}: holds {len(whole)} GGUF files; give one of them: {', '.join(whole[:5])}")
    return folder / whole[0] if whole else None


def _of_gguf(path: Path) -> Path:
    """The plain folder that a GGUF file has become."""
    from pocketsize.io.gguf.folder import plain_folder

    return plain_folder(path, cache_folder() / GGUF_CACHE)


def cached(found: Sample) -> Path:
    """Where the copy of a sample is, once it is fetched."""
    return cache_folder() / "samples" / found.folder


def cache_folder() -> Path:
    """Where fetched models are kept: $POCKETSIZE_CACHE, or the user's cache folder."""
    if own := os.environ.get("POCKETSIZE_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "pocketsize"
    return Path.home() / ".cache" / "pocketsize"
