"""Fetched copies of hub models: where they lie, which commit a revision stood for, whether they are whole.

The cache holds `hub/OWNER--NAME/COMMIT/` for a model's folder and `hub/OWNER--NAME/files/COMMIT/` for
single GGUF files. `hub/OWNER--NAME/revisions/` has a file for each branch or tag that was fetched,
with the commit it stood for then.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

from pocketsize.errors import DataError, IntegrityError
from pocketsize.io.hub.ids import MAIN, HubId, is_commit
from pocketsize.io.publish import make_folder, publish_bytes, sha256_of
from pocketsize.io.strictjson import read_json_object

FETCHED = "fetched.json"


@dataclass(frozen=True, slots=True)
class Kept:
    """A file of a fetched copy, as it was when it arrived."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Copy:
    """What `fetched.json` holds: which repository, which commit, which files."""

    repo: str
    commit: str
    file: str | None
    files: tuple[Kept, ...]

    @property
    def pinned(self) -> HubId:
        """The id that always means this copy."""
        return HubId(self.repo, self.commit, self.file)


def home_of(asked: HubId, cache: Path) -> Path:
    """The folder of all copies of a repository."""
    return cache / "hub" / asked.repo.replace("/", "--")


def folder_of(asked: HubId, commit: str, cache: Path) -> Path:
    """The folder of one copy: of the model, or of the one GGUF file that was asked for."""
    home = home_of(asked, cache)
    return home / "files" / commit / PurePosixPath(asked.file) if asked.file else home / commit


def commit_of(asked: HubId, cache: Path) -> str | None:
    """The commit that a revision stood for when it was fetched; None where it never was."""
    if asked.pinned:
        return asked.revision
    try:
        commit = _revision_file(asked, cache).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return commit if is_commit(commit) else None


def keep_revision(asked: HubId, commit: str, cache: Path) -> None:
    """Note what a revision stands for, and that the commit itself is here."""
    if not asked.pinned:
        make_folder(_revision_file(asked, cache).parent)
        publish_bytes(_revision_file(asked, cache), f"{commit}\n".encode())


def other_ids(asked: HubId, cache: Path) -> list[str]:
    """Ids under which another revision of the same model is here."""
    names = sorted(unquote(path.name) for path in (home_of(asked, cache) / "revisions").glob("[!.]*"))
    ids = [HubId(asked.repo, None if name == MAIN else name, asked.file) for name in names]
    return [str(one) for one in ids if find(one, cache)]


def find(asked: HubId, cache: Path) -> Path | None:
    """The folder of a fetched copy, or None; its files are not looked at."""
    commit = commit_of(asked, cache)
    folder = folder_of(asked, commit, cache) if commit else None
    return folder if folder and (folder / FETCHED).is_file() else None


def is_copy(folder: Path) -> bool:
    """Whether a folder was fetched from the hub, by its list of files."""
    return (folder / FETCHED).is_file()


def write_copy(folder: Path, copy: Copy) -> None:
    """Write the list of files of a copy into its folder."""
    publish_bytes(folder / FETCHED, (json.dumps(asdict(copy), indent=1) + "\n").encode())


def read_copy(folder: Path) -> Copy:
    """The list of files of a copy."""
    path = folder / FETCHED
    raw = read_json_object(path)
    try:
        files = tuple(Kept(**entry) for entry in raw["files"])  # type: ignore[union-attr]
        file = None if raw["file"] is None else str(raw["file"])
        copy = Copy(str(raw["repo"]), str(raw["commit"]), file, files)
        sound = all(isinstance(f.bytes, int) and PurePosixPath(f.name).name for f in files)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not a list of fetched files: {error!r}") from error
    if not sound or not files:
        raise DataError(f"{path}: not a list of fetched files; fetch the model again")
    return copy


def faults(folder: Path, *, hashes: bool) -> Iterator[str]:
    """What is not as it arrived, one sentence for each file: sizes, and with `hashes` every byte."""
    for kept in read_copy(folder).files:
        path = folder / kept.name
        if not path.is_file():
            yield f"{path}: missing"
        elif (size := path.stat().st_size) != kept.bytes:
            yield f"{path}: {size} bytes, {kept.bytes} were fetched"
        elif hashes and sha256_of(path) != kept.sha256:
            yield f"{path}: its bytes are not those that were fetched"


def require_whole(folder: Path, *, hashes: bool) -> Copy:
    """The copy in a folder; a file that is not as it arrived is an error with the line that mends it."""
    copy = read_copy(folder)
    if found := next(faults(folder, hashes=hashes), None):
        raise IntegrityError(f"{found}; run: pocketsize fetch {copy.pinned}")
    return copy


def _revision_file(asked: HubId, cache: Path) -> Path:
    return home_of(asked, cache) / "revisions" / quote(asked.branch, safe="")


def total_bytes(files: Sequence[Kept]) -> int:
    """Bytes of all files together."""
    return sum(file.bytes for file in files)
