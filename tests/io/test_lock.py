"""One writer at a time; a lock ends with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pocketsize.errors import BusyError, ResourceError
from pocketsize.io import lock as locking
from pocketsize.io.lock import lock, lock_file

HOLDER = """
import sys, time
from pathlib import Path
from pocketsize.io.lock import lock_file
lock_file(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_the_second_is_told_who_holds_it_and_since_when(tmp_path: Path) -> None:
    held = lock_file(tmp_path / "lock")
    with pytest.raises(BusyError) as error:
        lock_file(tmp_path / "lock")
    assert re.fullmatch(
        rf"{tmp_path}: process {os.getpid()}, since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00, "
        "is working on this output; wait for it to end",
        str(error.value),
    )
    os.close(held)
    os.close(lock_file(tmp_path / "lock"))


def test_the_lock_of_a_killed_process_is_no_obstacle(tmp_path: Path, source_env: dict[str, str]) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], env=source_env, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(BusyError, match=f"process {holder.pid}, since"):
        lock_file(path)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    os.close(lock_file(path))


def test_a_number_that_a_living_process_has_now_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(f"process {os.getppid()}, since 2020-01-01T00:00:00+00:00")
    os.close(lock_file(tmp_path / "lock"))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks_is_named(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ResourceError, match=r"lock: this file system has no locks .* on a local disk"):
        lock_file(tmp_path / "lock")


def test_a_lock_that_was_removed_meanwhile_is_not_held(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    (tmp_path / "lock").unlink()
    with pytest.raises(BusyError):
        lock(descriptor, tmp_path / "lock")
    (tmp_path / "lock").write_text("another one")
    with pytest.raises(BusyError):
        lock(descriptor, tmp_path / "lock")
    os.close(descriptor)


def test_what_cannot_be_written_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="absent/lock: cannot be made"):
        lock_file(tmp_path / "absent" / "lock")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locking.os, "pwrite", full)
    with pytest.raises(ResourceError, match="lock: No space left on device"):
        lock_file(tmp_path / "lock")
