"""From what a user types for a model to the folder that holds it."""

from __future__ import annotations

import os
from pathlib import Path

from pocketsize.errors import UnsupportedError, UsageError, did_you_mean
from pocketsize.io.samples import PREFIX, SAMPLES, Sample, sample_of
from pocketsize.io.strictjson import refuse_pickle

ORIGIN = "origin.json"


def resolve(model: str) -> Path:
    """The folder of a model: a path, or a sample that has been fetched."""
    if model.startswith(PREFIX):
        found = cached(sample_of(model))
        if not (found / ORIGIN).is_file():
            raise UsageError(f"{model} is not on this machine yet; run: pocketsize fetch {model}")
        return found
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        with path.open("rb") as file:
            refuse_pickle(file.read(64), path)
    if path.suffix == ".gguf" and path.is_file():
        raise UnsupportedError(f"{path}: GGUF is written, not yet read; give a safetensors folder")
    if path.exists():
        raise UsageError(f"{path}: not a folder; give the folder that holds config.json")
    hint = did_you_mean(PREFIX + model, [PREFIX + known for known in SAMPLES])
    raise UsageError(f"{model}: no such folder; give one in Hugging Face layout, or a sample{hint}")


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
