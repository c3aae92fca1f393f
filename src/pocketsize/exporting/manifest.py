"""MANIFEST.json: the SHA-256 of every file of a finished folder, written last."""

from __future__ import annotations

import json
from pathlib import Path

from pocketsize.errors import DataError
from pocketsize.io.publish import publish_bytes, sha256_of
from pocketsize.io.strictjson import read_json_object

NAME = "MANIFEST.json"


def write_manifest(folder: Path) -> None:
    """Write the hashes of all files now in the folder."""
    table = {name: sha256_of(folder / name) for name in _files(folder)}
    publish_bytes(folder / NAME, (json.dumps(table, indent=1) + "\n").encode())


def renew_entry(folder: Path, name: str) -> None:
    """Take up one file that was written again on purpose; every other entry stays as it is."""
    table = read_json_object(folder / NAME)
    table[name] = sha256_of(folder / name)
    publish_bytes(folder / NAME, (json.dumps(table, indent=1) + "\n").encode())


def added_files(folder: Path) -> list[str]:
    """Files, links and folders without files that the manifest does not know."""
    known = set(read_json_object(folder / NAME)) | {NAME}
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    folders = {
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_dir() and not any(p.iterdir())
    }
    return sorted((found - known) | folders)


def check_manifest(folder: Path) -> list[str]:
    """What differs from the manifest, one sentence for each file: missing, changed or added."""
    try:
        table = read_json_object(folder / NAME)
    except DataError as error:
        return [str(error)]
    present = set(_files(folder))
    problems = [f"{name}: missing" for name in sorted(table.keys() - present)]
    problems += [f"{name}: not in {NAME}" for name in sorted(present - table.keys())]
    for name in sorted(present & table.keys()):
        if sha256_of(folder / name) != table[name]:
            problems.append(f"{name}: its bytes are not those that were written")
    return problems


def _files(folder: Path) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if name != NAME)
