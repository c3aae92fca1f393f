"""Publishing: old state or new state, never half; durable; one writer."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from pocketsize.errors import BusyError, ResourceError, UsageError
from pocketsize.io import publish
from pocketsize.io.publish import publish_bytes, publish_stream, sha256_of, staging


def test_bytes_arrive_and_are_hashed(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    digest = publish_bytes(tmp_path / "a.bin", data)
    assert (tmp_path / "a.bin").read_bytes() == data
    assert digest == hashlib.sha256(data).hexdigest() == sha256_of(tmp_path / "a.bin")
    assert os.listdir(tmp_path) == ["a.bin"]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        publish_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    publish_bytes(path, b"old")

    def broken(out) -> None:
        out.write(b"new")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        publish_stream(path, broken)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_killed_write_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").write_bytes(b"much longer leftovers of a killed process")
    publish_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_calls_come_in_the_durable_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("write", "fsync", "rename"):
        real = getattr(os, name)

        def spy(*args, _real=real, _name=name):
            calls.append(_name)
            return _real(*args)

        monkeypatch.setattr(publish.os, name, spy)
    publish_bytes(tmp_path / "a", b"x")
    assert calls == ["write", "fsync", "rename", "fsync"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    path = tmp_path / "a"
    publish_bytes(path, b"old")

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(publish.os, call, refuse)
    with pytest.raises(ResourceError, match=f"{path}: {os.strerror(code)}"):
        publish_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"is the folder .*absent there"):
        publish_bytes(tmp_path / "absent" / "a", b"x")


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    def inner(out) -> None:
        with pytest.raises(BusyError):
            publish_bytes(tmp_path / "a", b"second")
        out.write(b"first")

    publish_stream(tmp_path / "a", inner)
    assert (tmp_path / "a").read_bytes() == b"first"


def test_staging_becomes_the_folder(tmp_path: Path) -> None:
    with staging(tmp_path / "x" / "out") as folder:
        assert folder.name == ".out.partial"
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        assert not (tmp_path / "x" / "out").exists()
    assert (tmp_path / "x" / "out" / "sub" / "a").read_text() == "a"
    assert os.listdir(tmp_path / "x") == ["out"]


def test_staging_takes_the_place_of_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staging(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    assert os.listdir(tmp_path / "out") == ["a"]


def test_staging_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staging(tmp_path / "x" / "y" / "out") as folder:
        (folder / "a").write_text("a")
        raise RuntimeError("stop")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["full", "file", "link"])
def test_staging_refuses_what_is_taken(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    match kind:
        case "full":
            out.mkdir()
            (out / "a").write_text("mine")
        case "file":
            out.write_text("mine")
        case "link":
            (tmp_path / "elsewhere").mkdir()
            out.symlink_to(tmp_path / "elsewhere")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UsageError, match="out: exists and is not"), staging(out):
        pytest.fail("the block must not run")
    assert sorted(os.listdir(tmp_path)) == before


def test_staging_empties_what_a_killed_process_left(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    (left / "sub").mkdir(parents=True)
    (left / "sub" / "old").write_text("old")
    with staging(tmp_path / "out") as folder:
        assert os.listdir(folder) == []
        (folder / "a").write_text("a")
    assert os.listdir(tmp_path / "out") == ["a"]


def test_staging_that_resumes_finds_what_was_left(tmp_path: Path) -> None:
    for again in (False, True):
        with pytest.raises(RuntimeError), staging(tmp_path / "x" / "out", resume=True) as folder:
            assert (folder / "a").exists() == again
            (folder / "a").write_text("a")
            raise RuntimeError("stop")
    with staging(tmp_path / "x" / "out", resume=True) as folder:
        (folder / "b").write_text("b")
    assert sorted(os.listdir(tmp_path / "x" / "out")) == ["a", "b"] and os.listdir(tmp_path / "x") == ["out"]


def test_staging_that_resumes_leaves_nothing_where_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staging(tmp_path / "x" / "out", resume=True):
        raise RuntimeError("stop")
    assert os.listdir(tmp_path) == []


def test_staging_has_one_writer(tmp_path: Path) -> None:
    with staging(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        with pytest.raises(BusyError), staging(tmp_path / "out"):
            pytest.fail("the block must not run")
        assert os.listdir(folder) == ["a"]
    assert os.listdir(tmp_path / "out") == ["a"]
