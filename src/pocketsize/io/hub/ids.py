"""What a user may type for a model on the hub: an id, an hf:// address, or the address of its page."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from pocketsize.errors import UsageError

PUBLIC = "https://huggingface.co"
MAIN = "main"
_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_REVISION = r"refs/(?:pr/\d+|convert/[\w.-]+)|\w[\w./-]*?"
_ID = re.compile(rf"({_NAME}/{_NAME})(?:@({_REVISION}))?(?:/(.+\.gguf))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT = "hf.co"
# Pages of a repository that name a revision and perhaps a file; others name no model.
_PLACES = ("blob", "raw", "resolve", "tree")
_OTHERS = ("datasets", "spaces", "kernels", "buckets", "collections", "papers", "docs", "api")


@dataclass(frozen=True, slots=True)
class HubId:
    """A model on the hub: its folder, or with `file` one GGUF file of it, by its path."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(f"{_NAME}/{_NAME}", self.repo, re.ASCII) or not _plain(self.repo, 96):
            raise UsageError(f"{self.repo!r} is no hub id; it is OWNER/NAME, such as openai-community/gpt2")
        if self.revision is not None and not _is_revision(self.revision):
            raise UsageError(f"revision {self.revision!r}: give a branch, a tag or a commit")
        if self.file is not None and not _is_gguf(self.file):
            raise UsageError(f"file {self.file!r}: give the name of a .gguf file in the repository")

    def __str__(self) -> str:
        """The id as it is typed."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}{f'/{self.file}' if self.file else ''}"

    @property
    def branch(self) -> str:
        """The revision that is meant: the one named, or the main branch."""
        return self.revision or MAIN

    @property
    def pinned(self) -> bool:
        """Whether the revision is a whole commit hash, which always means the same bytes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


def is_commit(text: object) -> bool:
    """Whether this is a whole commit hash."""
    return isinstance(text, str) and _COMMIT.fullmatch(text) is not None


def is_address(text: str) -> bool:
    """Whether this can only be an address, never a path."""
    return re.match(r"(hf|https?)://", text) is not None


def parse_hub(text: str) -> HubId | None:
    """The model that an id or an address names; None where the text is neither."""
    if text.startswith("hf://"):
        found = _ID.fullmatch(text.removeprefix("hf://").removeprefix("models/"))
        if found is None or found[1].split("/")[0] in _OTHERS:
            raise UsageError(f"{text}: names no model; it is hf://OWNER/NAME, or hf://OWNER/NAME@REVISION")
        return HubId(found[1], found[2], found[3])
    if is_address(text):
        return _of_page(text)
    found = _ID.fullmatch(text)
    if found is None or not _plain(found[1], 96):
        return None
    return HubId(found[1], found[2], found[3])


def _of_page(text: str) -> HubId:
    """The model whose page this is, on the hub or on the mirror that HF_ENDPOINT names."""
    address = urlsplit(text)
    mirror = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    if address.netloc not in {urlsplit(PUBLIC).netloc, _SHORT, mirror}:
        raise UsageError(f"{text}: not a page of huggingface.co; fetch takes hub ids such as OWNER/NAME")
    owner, name, place, *rest = [*(unquote(part) for part in address.path.strip("/").split("/")), "", ""]
    if not name or owner in _OTHERS or (place and place not in _PLACES):
        raise UsageError(f"{text}: not the page of a model; fetch takes hub ids such as OWNER/NAME")
    where = "/".join(rest).strip("/")
    wanted = rf"({_REVISION})()" if place == "tree" else rf"({_REVISION})/(.*\.gguf)"
    found = re.fullmatch(wanted, where, re.ASCII) if place else None
    if place and found is None:
        raise UsageError(f"{text}: no revision and no .gguf file of a model; give the id {owner}/{name}")
    return HubId(f"{owner}/{name}", found[1] if found else None, (found[2] or None) if found else None)


def _is_revision(text: str) -> bool:
    return re.fullmatch(_REVISION, text, re.ASCII) is not None and _plain(text, 120)


def _is_gguf(text: str) -> bool:
    parts = text.split("/")
    return text.endswith(".gguf") and text.isprintable() and all(p and p[0] not in ".~" for p in parts)


def _plain(text: str, longest: int) -> bool:
    """No part that a file system or the hub would read as something else."""
    strange = ("..", "--", "//") if longest == 96 else ("..", "//")
    return len(text) <= longest and not text.endswith(("/", ".git")) and not any(s in text for s in strange)
