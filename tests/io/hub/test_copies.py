"""Copies in the cache: what a revision stands for, and lists of files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketsize.errors import DataError, IntegrityError, UnsupportedError, UsageError
from pocketsize.io.hub.copies import (
    FETCHED,
    Copy,
    Kept,
    commit_of,
    faults,
    find,
    folder_of,
    keep_revision,
    require_whole,
    write_copy,
)
from pocketsize.io.hub.ids import HubId
from pocketsize.io.publish import publish_bytes
from pocketsize.io.source import fetched_copy, resolve

ASKED, COMMIT = HubId("org/name", "v1"), "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POCKETSIZE_CACHE", str(tmp_path))
    return tmp_path


def _copy(asked: HubId, cache: Path, name: str = "config.json") -> Path:
    folder = folder_of(asked, COMMIT, cache)
    folder.mkdir(parents=True)
    kept = Kept(name, 2, publish_bytes(folder / name, b"{}"))
    write_copy(folder, Copy(asked.repo, COMMIT, asked.file, (kept,)))
    keep_revision(asked, COMMIT, cache)
    return folder


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", "feature/x", None])
def test_a_revision_is_found_by_its_name_and_by_its_commit(revision: str | None, cache: Path) -> None:
    asked = HubId("org/name", revision)
    assert find(asked, cache) is None
    folder = _copy(asked, cache)
    assert find(asked, cache) == folder == find(HubId("org/name", COMMIT), cache)
    assert find(HubId("org/name", "v2"), cache) is None
    assert {path.name for path in (cache / "hub").iterdir()} == {"org--name"}


def test_a_revision_that_stands_for_no_commit_is_not_there(cache: Path) -> None:
    _copy(ASKED, cache)
    (cache / "hub" / "org--name" / "revisions" / "v1").write_text("../../elsewhere")
    assert commit_of(ASKED, cache) is None and find(ASKED, cache) is None


def test_a_gguf_file_is_a_model_of_its_own(cache: Path) -> None:
    folder = _copy(HubId("org/name", None, "Q4/m.gguf"), cache, "m.gguf")
    with pytest.raises((UnsupportedError, DataError)) as caught:
        resolve("org/name/Q4/m.gguf")
    assert str(folder / "m.gguf") in str(caught.value)
    with pytest.raises(UsageError, match=r"run: pocketsize fetch org/name$"):
        resolve("org/name")
    paths = ("org/name/Q4/m.gguf", str(folder), str(folder / "m.gguf"))
    assert [fetched_copy(path) for path in paths] == [folder] * 3


def test_what_is_no_copy(cache: Path) -> None:
    assert fetched_copy(str(cache)) is None and fetched_copy("sample:minilm-l6") is None
    with pytest.raises(UsageError, match="not fetched"):
        fetched_copy("org/name")


def test_sizes_are_looked_at_by_every_load_and_bytes_when_asked_for(cache: Path) -> None:
    folder = _copy(ASKED, cache)
    assert resolve("org/name@v1") == folder
    (folder / "config.json").write_bytes(b"[]")
    assert resolve("org/name@v1") == folder
    with pytest.raises(
        IntegrityError, match=f"not those that were fetched; run: pocketsize fetch org/name@{COMMIT}"
    ):
        require_whole(folder, hashes=True)
    (folder / "config.json").write_bytes(b"[ ]")
    with pytest.raises(IntegrityError, match="3 bytes, 2 were fetched; run: pocketsize fetch org/name@0123"):
        resolve("org/name@v1")
    (folder / "config.json").unlink()
    assert [*faults(folder, hashes=False)] == [f"{folder / 'config.json'}: missing"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"repo": 1, "commit": 2, "file": null, "files": []}',
        '{"files": [{"name": "a"}]}',
    ],
)
def test_a_list_of_files_that_is_none(text: str, cache: Path) -> None:
    folder = _copy(ASKED, cache)
    (folder / FETCHED).write_text(text)
    with pytest.raises(DataError, match=FETCHED):
        resolve("org/name@v1")


def test_files_that_the_list_does_not_know_are_no_fault(cache: Path) -> None:
    folder = _copy(ASKED, cache)
    (folder / "notes.txt").write_text("mine")
    assert json.loads((folder / FETCHED).read_text())["commit"] == COMMIT
    assert not [*faults(folder, hashes=True)]
