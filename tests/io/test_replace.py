"""A folder that is replaced is there, old or new and whole, whenever one looks; killed anywhere, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pocketsize.errors import BusyError, ResourceError, UsageError
from pocketsize.io import publish
from pocketsize.io.publish import clear_leftovers, staging

# Replaces the folder sys.argv[1], killing itself at the n-th call that touches a name or the disk.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from pocketsize.io import publish
count = int(sys.argv[2])
def counted(owner, name):
    real = getattr(owner, name)
    def wrapped(*args, **kwargs):
        global count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, wrapped)
if sys.argv[3] == "two steps":
    publish._exchange = lambda a, b: False
for owner, name in ((os, "rename"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (publish, "_exchange")):
    counted(owner, name)
publish.clear_leftovers(Path(sys.argv[1]))
with publish.staging(Path(sys.argv[1]), replace=True) as folder:
    for i in range(3):
        (folder / str(i)).write_text("new")
"""


def folder_of(path: Path, text: str) -> Path:
    path.mkdir()
    for i in range(3):
        (path / str(i)).write_text(text)
    return path


def texts(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.iterdir()} if folder.is_dir() else set()


@pytest.mark.parametrize("how", ["at once", "two steps"])
def test_killed_anywhere_the_old_or_the_new_folder_is_whole(
    how: str, tmp_path: Path, source_env: dict[str, str]
) -> None:
    seen: list[set[str]] = []
    for count in range(60):
        place = tmp_path / str(count)
        place.mkdir()
        out = folder_of(place / "out", "old")
        call = [sys.executable, "-c", KILLED, str(out), str(count), how]
        done = subprocess.run(call, env=source_env, capture_output=True, check=False)
        whole = {path for path in place.iterdir() if len(list(path.iterdir())) == 3 and len(texts(path)) == 1}
        assert any(texts(path) == {"old"} for path in whole) or texts(out) == {"new"}, count
        if how == "at once":
            assert out in whole
        seen.append(texts(out))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        clear_leftovers(out)
        assert out.is_dir() and len(list(out.iterdir())) == 3 and len(texts(out)) == 1
        assert os.listdir(place) == ["out"]
    assert seen[0] == {"old"} and seen[-1] == {"new"} and len(seen) > 8
    assert os.listdir(place) == ["out"]


@pytest.mark.parametrize("how", ["at once", "two steps"])
def test_an_error_leaves_the_old_folder(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "two steps":
        monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
    out = folder_of(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), staging(out, replace=True) as folder:
        (folder / "0").write_text("new")
        raise RuntimeError("stop")
    assert texts(out) == {"old"} and os.listdir(tmp_path) == ["out"]


def test_a_second_step_that_fails_gives_the_old_folder_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
    out, real = folder_of(tmp_path / "out", "old"), os.rename

    def rename(source: Path, target: Path) -> None:
        if source.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ResourceError, match="Input/output error"), staging(out, replace=True) as folder:
        (folder / "0").write_text("new")
    assert texts(out) == {"old"} and os.listdir(tmp_path) == ["out"]


def test_a_folder_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    out = folder_of(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="exists and is not empty"), staging(out):
        pytest.fail("the block must not run")
    assert texts(out) == {"old"}


@pytest.mark.parametrize("kind", ["file", "link"])
def test_nothing_but_a_folder_is_replaced(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(folder_of(tmp_path / "elsewhere", "mine"))
    with pytest.raises(UsageError, match="not a folder"), staging(out, replace=True):
        pytest.fail("the block must not run")


def test_leftovers_of_a_process_at_work_stay(tmp_path: Path) -> None:
    with staging(tmp_path / "out") as folder:
        (folder / "0").write_text("new")
        clear_leftovers(tmp_path / "out")
        assert texts(folder) == {"new"}
        with pytest.raises(BusyError), staging(tmp_path / "out"):
            pytest.fail("the block must not run")
    assert texts(tmp_path / "out") == {"new"}


def test_clearing_touches_no_other_name(tmp_path: Path) -> None:
    for name in (".other.partial", ".out.work", "out.partial"):
        folder_of(tmp_path / name, "mine")
    folder_of(tmp_path / ".out.partial", "half")
    clear_leftovers(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".other.partial", ".out.work", "out.partial"]
