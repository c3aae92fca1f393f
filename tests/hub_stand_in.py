"""A stand-in for the hub, on this machine: the parts of its HTTP interface that clients use to fetch a model.

What it answers is what huggingface_hub reads (its own client is run against it in the tests): model
info with the blobs' sizes and hashes, revisions, `resolve` with ETag, X-Repo-Commit, X-Linked-ETag and
X-Linked-Size, redirects of small files within the hub and of large ones to a second host, HEAD, and Range.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".bin")


@dataclass
class Seen:
    """A request that arrived: at which host, for what, and with which headers (names in small letters)."""

    host: str
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Repo:
    """A repository: files of each commit, what branches and tags stand for, and facts of its card."""

    commits: dict[str, dict[str, bytes]]
    revisions: dict[str, str]
    card: dict[str, object] = field(default_factory=dict)


# Handles a request in its own way; False leaves it to the stand-in.
Fault = Callable[["Handler"], bool]


class Server(ThreadingHTTPServer):
    """Answers each request in a thread of its own, and says nothing when a client hangs up."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class StandIn:
    """Two servers that share what they hold: the hub, and the host that large files come from."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.faults: dict[str, Fault] = {}
        self.seen: list[Seen] = []
        self.sent_bytes = 0
        self.servers = [Server(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self.servers:
            server.stand_in = self  # type: ignore[attr-defined]

    @property
    def url(self) -> str:
        """The address of the hub."""
        return f"http://127.0.0.1:{self.servers[0].server_port}"

    @property
    def store(self) -> str:
        """The address of the host of large files."""
        return f"http://127.0.0.1:{self.servers[1].server_port}"

    def add(self, repo: str, folder: Path, *, revision: str = "main", **card: object) -> str:
        """Hold the files of a folder as one commit; its hash."""
        names = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return self.add_files(
            repo,
            {path.relative_to(folder).as_posix(): path.read_bytes() for path in names},
            revision=revision,
            **card,
        )

    def add_files(
        self, repo: str, files: Mapping[str, bytes], *, revision: str = "main", **card: object
    ) -> str:
        """Hold files as one commit of a repository, for which the revision stands from now on."""
        held = self.repos.setdefault(repo, Repo({}, {}, dict(card)))
        content = b"".join(name.encode() + data for name, data in sorted(files.items()))
        commit = hashlib.sha1(content).hexdigest()
        held.commits[commit] = dict(files)
        held.revisions[revision] = commit
        return commit

    def requests(self, part: str, method: str = "GET") -> list[Seen]:
        """The requests so far with `part` in their path."""
        return [seen for seen in self.seen if part in seen.path and seen.method == method]


@contextlib.contextmanager
def running() -> Iterator[StandIn]:
    """A stand-in that answers until the block ends."""
    hub = StandIn()
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in hub.servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in hub.servers:
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> StandIn:
        return self.server.stand_in  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        host = "hub" if self.server is self.hub.servers[0] else "store"
        self.hub.seen.append(Seen(host, self.command, unquote(self.path), headers))
        with contextlib.suppress(ConnectionError):
            for part, fault in self.hub.faults.items():
                if part in unquote(self.path) and fault(self):
                    return
            self._store() if host == "store" else self._hub()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def reply(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        """A whole answer."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.hub.sent_bytes += len(body)
            self.wfile.write(body)

    def fail(self, status: int, code: str = "", message: str = "", **headers: str) -> bool:
        """An error as the hub gives it; True, for faults."""
        named = {"X-Error-Code": code, "X-Error-Message": message} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        body = json.dumps({"error": message}).encode()
        self.reply(status, {k: v for k, v in named.items() if v} | {"Content-Type": "application/json"}, body)
        return True

    def _hub(self) -> None:
        path = urlsplit(self.path).path
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(found[1], unquote(found[2] or "main"))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], unquote(found[2]), unquote(found[3]))
        elif found := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            commit, name = found[2], unquote(found[3])
            data = self.hub.repos[found[1]].commits[commit][name]
            self._body(data, {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(data)}"'})
        else:
            self.fail(404, "", "Not Found")

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo not in self.hub.repos:
            # The hub does not tell strangers whether a repository is private or not there.
            status = 404 if self.headers.get("Authorization") else 401
            self.fail(status, "RepoNotFound", "Repository not found")
            return None
        held = self.hub.repos[repo]
        commit = held.revisions.get(revision, revision)
        if commit not in held.commits:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, held.commits[commit]

    def _info(self, repo: str, revision: str) -> None:
        if repo in self.hub.renamed:
            target = self.path.replace(repo, self.hub.renamed[repo], 1)
            self.reply(307, {"Location": target})
            return
        if (found := self._files(repo, revision)) is None:
            return
        commit, files = found
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = [entry(name, data) if blobs else {"rfilename": name} for name, data in files.items()]
        facts = {"_id": "0" * 24, "id": repo, "modelId": repo, "sha": commit, "private": False}
        facts |= {"tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False}
        facts |= {"cardData": self.hub.repos[repo].card, "siblings": siblings}
        self.reply(200, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(facts).encode())

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if (found := self._files(repo, revision)) is None:
            return
        commit, files = found
        if name not in files:
            self.fail(404, "EntryNotFound", "Entry not found")
            return
        data = files[name]
        if not name.endswith(LARGE):
            target = f"/api/resolve-cache/models/{repo}/{commit}/{quote(name)}"
            known = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{git_sha1(data)}"'}
            self.reply(307, {"X-Repo-Commit": commit, "Location": target} | known)
            return
        sha256 = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256}"'}
        target = f"{self.hub.store}/{repo}/{commit}/{name}?signature=secret"
        self.reply(302, {"X-Repo-Commit": commit, "Location": target} | linked)

    def _store(self) -> None:
        _, owner, name, commit, file = unquote(urlsplit(self.path).path).split("/", 4)
        data = self.hub.repos[f"{owner}/{name}"].commits[commit][file]
        self._body(data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def _body(self, data: bytes, headers: dict[str, str]) -> None:
        kind = {"Content-Type": "text/plain; charset=utf-8", "Accept-Ranges": "bytes"}
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if found is None:
            self.reply(200, kind | headers, data)
        elif int(found[1]) >= len(data):
            self.reply(416, {"Content-Range": f"bytes */{len(data)}"})
        else:
            begin = int(found[1])
            extent = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}
            self.reply(206, kind | headers | extent, data[begin:])


def entry(name: str, data: bytes) -> dict[str, object]:
    """A file as the hub lists it with its blob."""
    if not name.endswith(LARGE):
        return {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
    sha256 = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
    large = {"sha256": sha256, "size": len(data), "pointerSize": len(pointer)}
    return {"rfilename": name, "size": len(data), "blobId": git_sha1(pointer), "lfs": large}


def git_sha1(data: bytes) -> str:
    """What git calls these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
