"""One file from a hub: goes on where an earlier process was killed, and is checked by size and hash."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pocketsize.errors import DataError, IntegrityError, ResourceError
from pocketsize.io.hub.http import Hub, PassingError, answer, patiently
from pocketsize.io.hub.ids import HubId
from pocketsize.io.hub.listing import Listing, Remote, address
from pocketsize.io.publish import make_folder

_CHUNK = 1 << 20
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Source:
    """Where files come from: a hub, what was asked of it, and what it listed."""

    hub: Hub
    asked: HubId
    listing: Listing


class _Part:
    """The bytes of a file that are here, and their hashes, which grow with them."""

    def __init__(self, descriptor: int, path: Path, remote: Remote) -> None:
        self.path, self.remote, self.have = path, remote, 0
        self._descriptor = descriptor
        self._begin()
        while piece := os.pread(descriptor, _CHUNK, self.have):
            self._count(piece)

    def add(self, piece: bytes) -> None:
        """Append to the file."""
        view = memoryview(piece)
        try:
            done = 0
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], self.have + done)
        except OSError as error:
            raise ResourceError(f"{self.path}: {error.strerror}; free some space on that disk") from error
        self._count(piece)

    def restart(self) -> None:
        """Forget all bytes."""
        os.ftruncate(self._descriptor, 0)
        self.have = 0
        self._begin()

    @property
    def sha256(self) -> str:
        """Of the bytes so far."""
        return self._sha256.hexdigest()

    @property
    def is_right(self) -> bool:
        """Whether the bytes are those that the hub listed."""
        if self.have != self.remote.bytes:
            return False
        if self.remote.sha256:
            return self.sha256 == self.remote.sha256
        return self._git.hexdigest() == self.remote.git_sha1

    def _begin(self) -> None:
        self._sha256 = hashlib.sha256()
        # What git calls a blob: its size, then its bytes.
        self._git = hashlib.sha1(b"blob %d\0" % self.remote.bytes, usedforsecurity=False)

    def _count(self, piece: bytes) -> None:
        self._sha256.update(piece)
        if not self.remote.sha256:
            self._git.update(piece)
        self.have += len(piece)


def download(source: Source, remote: Remote, path: Path, progress: Callable[[int], None]) -> str:
    """The SHA-256 of the file that is now at `path`, as the hub listed it; `progress` gets its bytes so far.

    A part that is there is gone on with. Where the whole then has another hash, the part was not of
    this file, and it is fetched once more from its beginning.
    """
    with _opened(path) as descriptor:
        part = _Part(descriptor, path, remote)
        resumed = part.have > 0
        if part.have > remote.bytes:
            part.restart()
        _complete(source, part, progress)
        if not part.is_right and resumed:
            part.restart()
            _complete(source, part, progress)
        if not part.is_right:
            found = f"SHA-256 {part.sha256}" if remote.sha256 else "another hash"
            listed = remote.sha256 or f"git's SHA-1 {remote.git_sha1}"
            part.restart()
            raise IntegrityError(
                f"{source.asked}: {remote.name} from {source.hub.host} has {found}, listed is {listed}; "
                "it is not kept; run it again later"
            )
        return part.sha256


def _complete(source: Source, part: _Part, progress: Callable[[int], None]) -> None:
    """Receive what is missing, in as many goes as the connection needs."""

    def receive() -> None:
        _receive(source, part, progress)

    progress(part.have)
    if part.have < part.remote.bytes:
        patiently(receive, tries=_TRIES, so_far=lambda: part.have)


def _receive(source: Source, part: _Part, progress: Callable[[int], None]) -> None:
    remote, where = part.remote, f"{source.asked}: {part.remote.name} from {source.hub.host}"
    url = address(source.hub, source.listing, remote.name)
    with answer(source.hub, url, source.asked, begin=part.have, elsewhere=True) as response:
        if response.status_code == 200 and part.have:
            # The whole file comes, whatever was asked for.
            part.restart()
        _check_extent(response.status_code, response.headers, part, where)
        for piece in response.iter_bytes():
            if part.have + len(piece) > remote.bytes:
                part.restart()
                raise IntegrityError(f"{where}: longer than the {remote.bytes} bytes that were listed")
            part.add(piece)
            progress(part.have)
    if part.have < remote.bytes:
        missing = f"ended after {part.have} of {remote.bytes} bytes"
        raise PassingError(f"{where}: {missing}; run it again to go on")


def _check_extent(status: int, stated: Mapping[str, str], part: _Part, where: str) -> None:
    """Refuses an answer of another length, before its body is read."""
    total = part.remote.bytes
    if status == 206:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", stated.get("content-range", "").strip())
        if found is None or int(found[1]) != part.have:
            raise DataError(f"{where}: asked from byte {part.have} on, answered {found and found[0]!r}")
        length = int(found[3]) if found[3] != "*" else total
    elif "content-encoding" in stated or "content-length" not in stated:
        return
    else:
        length = int(stated["content-length"])
    if length != total:
        raise IntegrityError(f"{where}: {length} bytes there, {total} listed; run it again later")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a plain file that is made if it is not there; never a link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        make_folder(path.parent)
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        raise ResourceError(f"{path}: {error.strerror or error}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
