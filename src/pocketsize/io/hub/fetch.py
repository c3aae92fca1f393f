"""Brings a model from a hub to this machine: pinned to a commit, checked by hash, published whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from pocketsize.errors import ResourceError, UnsupportedError
from pocketsize.io.console import Terminal
from pocketsize.io.hub.choice import INDEX, choose, shards
from pocketsize.io.hub.copies import (
    Copy,
    Kept,
    faults,
    find,
    folder_of,
    is_copy,
    keep_revision,
    read_copy,
    write_copy,
)
from pocketsize.io.hub.download import Source, download
from pocketsize.io.hub.http import connect
from pocketsize.io.hub.ids import HubId
from pocketsize.io.hub.listing import Listing, Remote, read_listing
from pocketsize.io.publish import make_folder, publish_bytes, publish_stream, remove, staging
from pocketsize.io.source import ORIGIN, cache_folder

# Above this a hub sends a file through xet alone, which asks other hosts.
LARGEST_BYTES = 50_000_000_000
_ROOM_BYTES = 64 << 20

Announce = Callable[[Sequence[Remote]], None]


def fetch_repo(asked: HubId, console: Terminal, announce: Announce) -> tuple[Path, Copy]:
    """The folder in the cache that now holds the model, and the list of its files.

    A copy that is there and whole is left alone; when a commit was asked for, the hub is not even
    asked. `announce` gets the files, with size and hash, before the large ones are downloaded. What a
    killed process left unfinished is gone on with.
    """
    cache = cache_folder()
    if asked.pinned and (whole := _whole(asked, cache)):
        return whole
    hub = connect()
    console.phase(f"asking {hub.host} for {asked}")
    listing = read_listing(hub, asked)
    pinned = replace(asked, revision=listing.commit)
    found = _whole(pinned, cache)
    if found is None:
        final = folder_of(asked, listing.commit, cache)
        with staging(final, replace=True, resume=True) as folder:
            source = Source(hub, asked, listing)
            _reuse(final, folder)
            kept = _bring(source, folder, console, announce)
            copy = _describe(folder, asked, listing, kept)
        found = final, copy
    keep_revision(asked, listing.commit, cache)
    return found


def _whole(asked: HubId, cache: Path) -> tuple[Path, Copy] | None:
    """The copy that is here, if every byte of it is as it arrived."""
    folder = find(asked, cache)
    if folder is None or next(faults(folder, hashes=True), None):
        return None
    return folder, read_copy(folder)


def _reuse(final: Path, folder: Path) -> None:
    """Take over what a copy that is no longer whole still holds; each file is checked like a part of one."""
    names = [kept.name for kept in read_copy(final).files] if is_copy(final) else []
    for name in names:
        if (final / name).is_file() and not (folder / name).exists():
            make_folder((folder / name).parent)
            with (final / name).open("rb") as file:
                publish_stream(folder / name, partial(shutil.copyfileobj, file))


def _bring(source: Source, folder: Path, console: Terminal, announce: Announce) -> tuple[Kept, ...]:
    """Download all files into a folder; the index first, since it names the shards."""
    listing, asked = source.listing, source.asked
    names = choose(asked, listing.entries)
    if INDEX in names:
        download(source, listing.remote(INDEX), folder / INDEX, lambda have: None)
        names += shards(asked, folder / INDEX, listing.entries)
    remotes = [listing.remote(name) for name in names]
    announce(remotes)
    _require_room(folder, asked, remotes)
    console.phase(f"downloading {asked}")
    total, done, kept = sum(remote.bytes for remote in remotes), 0, []
    for remote in remotes:
        # One GGUF file lies in a folder of its own, under its own name.
        path = folder / (PurePosixPath(remote.name).name if asked.file else remote.name)

        def progress(have: int, before: int = done, name: str = path.name) -> None:
            console.progress((before + have) // 1_000_000, total // 1_000_000, f"MB, {name}")

        sha256 = download(source, remote, path, progress)
        kept.append(Kept(path.relative_to(folder).as_posix(), remote.bytes, sha256))
        done += remote.bytes
    return tuple(kept)


def _require_room(folder: Path, asked: HubId, remotes: Sequence[Remote]) -> None:
    """Refuses what does not fit on the disk, or does not come over HTTP, before it is begun."""
    for remote in remotes:
        if remote.bytes > LARGEST_BYTES:
            size = f"{remote.bytes / 1e9:.1f} GB"
            raise UnsupportedError(
                f"{asked}: {remote.name} has {size}; no hub sends more than 50 GB in one file"
            )
    here = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    missing = max(0, sum(remote.bytes for remote in remotes) - here) + _ROOM_BYTES
    if missing > (free := shutil.disk_usage(folder).free):
        raise ResourceError(
            f"{folder.parent}: {free / 1e6:.0f} MB free, {asked} needs {missing / 1e6:.0f} MB more; "
            "free some space, or name a folder on another disk in POCKETSIZE_CACHE"
        )


def _describe(folder: Path, asked: HubId, listing: Listing, kept: tuple[Kept, ...]) -> Copy:
    """Say what the folder is, and remove what an earlier attempt left that is not of it."""
    names = {file.name for file in kept}
    for path in [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]:
        if path.relative_to(folder).as_posix() not in names:
            remove(path)
    said = {"name": listing.repo, "licence": listing.licence, "revision": listing.commit}
    data = (json.dumps(said, indent=2) + "\n").encode()
    origin = Kept(ORIGIN, len(data), publish_bytes(folder / ORIGIN, data))
    copy = Copy(listing.repo, listing.commit, asked.file, (*kept, origin))
    write_copy(folder, copy)
    return copy
