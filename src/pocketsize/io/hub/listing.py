"""What a repository holds at one commit, as the hub lists it: names, sizes, hashes, licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pocketsize.errors import DataError, UnsupportedError, UsageError
from pocketsize.io.hub.http import Hub, patiently, read_answer
from pocketsize.io.hub.ids import HubId, is_commit
from pocketsize.io.strictjson import parse_json_object

_LIMIT_BYTES = 64 << 20
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Remote:
    """A file on the hub: large ones have a SHA-256, others the SHA-1 that git gives them."""

    name: str
    bytes: int
    sha256: str | None
    git_sha1: str


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit."""

    host: str
    repo: str
    commit: str
    licence: str
    entries: Mapping[str, Mapping[str, object]]

    def remote(self, name: str) -> Remote:
        """A listed file; one whose bytes could not be checked is refused."""
        entry = self.entries[name]
        large = entry.get("lfs")
        size, blob = entry.get("size"), entry.get("blobId")
        sha256 = large.get("sha256") if isinstance(large, Mapping) else None
        known = _is_hex(sha256, 64) if large else _is_hex(blob, 40)
        if not known or not isinstance(size, int) or size < 0:
            raise UnsupportedError(
                f"{self.repo}: {self.host} states no size or hash of {name}, so it could not be checked; "
                "fetch from a hub that does (HF_ENDPOINT)"
            )
        return Remote(name, size, str(sha256) if large else None, str(blob))


def read_listing(hub: Hub, asked: HubId) -> Listing:
    """What the hub says of a model; its revision is resolved to a commit."""
    url = f"{hub.endpoint}/api/models/{asked.repo}/revision/{quote(asked.branch, safe='')}?blobs=true"
    body = patiently(lambda: read_answer(hub, url, asked, limit_bytes=_LIMIT_BYTES), tries=_TRIES)
    # The second name is that of the answer in messages.
    raw = parse_json_object(body, Path(f"{asked}: the answer of {hub.host}"))
    repo, commit, listed = raw.get("id"), raw.get("sha"), raw.get("siblings")
    if not isinstance(repo, str) or not is_commit(commit) or not isinstance(listed, list):
        raise DataError(f"{asked}: {hub.host} does not answer as a hub does (id, sha, siblings)")
    if repo != asked.repo:
        named = str(HubId(repo, asked.revision, asked.file))
        raise UsageError(f"{asked}: is called {repo} now; run: pocketsize fetch {named}")
    entries: dict[str, Mapping[str, object]] = {}
    for entry in listed:
        name = entry.get("rfilename") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or name in entries:
            raise DataError(f"{asked}: {hub.host} lists {name!r}, which is no name, or twice")
        entries[name] = entry
    return Listing(hub.host, repo, str(commit), _licence(raw), entries)


def address(hub: Hub, listing: Listing, name: str) -> str:
    """Where a file is, at the commit that was listed."""
    return f"{hub.endpoint}/{listing.repo}/resolve/{listing.commit}/{quote(name)}"


def _licence(raw: Mapping[str, object]) -> str:
    """The licence that the model's card states; the name of its own where it is `other`."""
    card = raw.get("cardData")
    stated = card.get("license") if isinstance(card, Mapping) else None
    if stated == "other" and isinstance(card, Mapping):
        stated = card.get("license_name") or stated
    return stated if isinstance(stated, str) else ""


def _is_hex(text: object, digits: int) -> bool:
    return isinstance(text, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", text) is not None
