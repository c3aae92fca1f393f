"""Kernel locks: one writer at a time. They end with their process, so a killed one is in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pocketsize.errors import BusyError, ResourceError

# What file systems without locks answer: some network file systems, folders on others.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL)


def lock(descriptor: int, path: Path) -> None:
    """Takes the lock of what is open as `descriptor`, and makes sure that it still has the name `path`.

    Between opening and locking, its former owner may have renamed or removed it: writing on would
    change a file that is already published, or hold a lock that nobody else can see.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours, named = os.fstat(descriptor), os.stat(path, follow_symlinks=False)
    except (BlockingIOError, FileNotFoundError) as error:
        raise BusyError(f"{path}: another process is writing it; wait for it to end") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise ResourceError(
            f"{path}: this file system has no locks ({error.strerror}), and two processes could write at "
            "once; choose a place on a local disk"
        ) from error
    if (ours.st_dev, ours.st_ino) != (named.st_dev, named.st_ino):
        raise BusyError(f"{path}: another process is writing it; wait for it to end")


def lock_file(path: Path) -> int:
    """A descriptor of the locked file `path`, which now says who holds it and since when."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be made: {error.strerror}; choose another output") from error
    try:
        lock(descriptor, path)
    except BusyError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "a process that just began"
        os.close(descriptor)
        raise BusyError(f"{path.parent}: {holder}, is working on this output; wait for it to end") from error
    except BaseException as error:
        _give_up(descriptor, path if isinstance(error, ResourceError) else None)
        raise
    try:
        os.ftruncate(descriptor, 0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        os.pwrite(descriptor, f"process {os.getpid()}, since {now}".encode(), 0)
    except OSError as error:
        _give_up(descriptor, path)
        raise ResourceError(f"{path}: {error.strerror}") from error
    return descriptor


def _give_up(descriptor: int, path: Path | None) -> None:
    """Close a lock file, and remove it where nobody else can hold it."""
    if path is not None:
        with suppress(OSError):
            path.unlink()
    os.close(descriptor)
