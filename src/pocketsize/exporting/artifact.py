"""What an export hands over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file or folder that was written and read back.

    `path` is relative to the output folder (`.` for the folder itself), `files` maps each file
    that belongs to it to its SHA-256, `bytes` counts the weights file or files alone, and
    `checks` holds what reading it back showed, one sentence each.
    """

    path: str
    format: str
    bytes: int
    files: dict[str, str]
    checks: tuple[str, ...] = ()
