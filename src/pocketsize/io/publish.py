"""The one place that writes files: beside, flushed to the disk, then renamed into place.

A reader never sees half a file, and a name that is visible is durable. What is being written has
the name `.NAME.partial`, held by a kernel lock that ends with its process, so a killed write leaves
nothing that the next one would trust or trip over.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from pocketsize.errors import BusyError, ResourceError, UsageError
from pocketsize.io.lock import lock

_CHUNK = 1 << 20
# AT_FDCWD, and RENAME_EXCHANGE of Linux, which is RENAME_SWAP of macOS.
_HERE, _SWAP = -100, 2


def publish_bytes(path: Path, data: bytes) -> str:
    """The SHA-256 of `data`, which the file at `path` now holds."""
    return publish_stream(path, lambda out: _write_all(out, data))


def publish_stream(path: Path, write: Callable[[BinaryIO], None]) -> str:
    """The SHA-256 of what `write` wrote, which the file at `path` now holds.

    `write` gets a stream that only moves forward. When it raises, the file that was there before
    is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    descriptor = _claim_file(partial)
    try:
        out = _Hashing(descriptor, path)
        write(cast(BinaryIO, out))
        out.drain()
        with _explained(path):
            os.fsync(descriptor)
            os.rename(partial, path)
    except BaseException:
        remove(partial)
        raise
    finally:
        os.close(descriptor)
    fsync(path.parent)
    return out.sha256.hexdigest()


def append(path: Path, data: bytes) -> None:
    """Add `data` to the end of a file, durably. When it raises, a part of it may stand there."""
    new = not path.exists()
    with _explained(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        out = _Hashing(descriptor, path)
        out.write(data)
        out.drain()
        with _explained(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if new:
        fsync(path.parent)


def move(source: Path, target: Path) -> None:
    """Give a file another name in its folder, durably; what had that name is replaced."""
    with _explained(target):
        os.replace(source, target)
    fsync(target.parent)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder with its parents where they are missing; those that had to be made, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove(*paths: Path) -> None:
    """Remove files and folders, in this order; what cannot be removed stays, and is no error."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove these folders, in this order, as far as they are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A folder among the system's temporary ones, gone with all that is in it when the block ends."""
    with _explained(Path(tempfile.gettempdir())):
        folder = tempfile.TemporaryDirectory(prefix=f"pocketsize-{name}-")
    with folder as place:
        yield Path(place)


@contextmanager
def staging(final: Path, *, replace: bool = False, resume: bool = False) -> Iterator[Path]:
    """A folder beside `final` to write into; it becomes `final` when the block ends without error.

    `final` must not exist, or be an empty folder. Then every file is flushed, the folder is
    renamed, and its parent is flushed. With `replace`, `final` may be a folder with something in
    it: it is there, as it was, until the new one is in its place, and is then removed. On an
    exception nothing stays; with `resume` what was written stays, and is there when the next
    `staging` of `final` begins.
    """
    final = Path(os.path.abspath(final))
    _require_free(final, replace=replace)
    made = make_folder(final.parent)
    partial = _partial(final)
    lock = None
    try:
        lock = _claim_folder(partial, clear=not resume)
        yield partial
        for folder, _, files in os.walk(partial):
            for name in files:
                fsync(Path(folder, name))
            fsync(Path(folder))
        _require_free(final, replace=replace)
        with _explained(final):
            old = _put(partial, final)
    except BaseException:
        if lock is not None and not resume:
            remove(partial)
        # Where nothing was written, there is nothing to go on with.
        remove_empty([partial, *made] if lock is not None else made)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    for folder in [final.parent, *(m.parent for m in made)]:
        fsync(folder)
    if old is not None:
        remove(old)


def clear_leftovers(final: Path) -> None:
    """Remove what a killed `staging` of `final` left beside it; one at work is left alone.

    Where it was killed while a folder was being replaced, the old folder gets its name back.
    """
    final = Path(os.path.abspath(final))
    aside, partial = _aside(final), _partial(final)
    if aside.is_dir() and not aside.is_symlink():
        if os.path.lexists(final):
            remove(aside)
        else:
            with _explained(final):
                os.rename(aside, final)
            fsync(final.parent)
    if not partial.is_dir() or partial.is_symlink():
        return
    try:
        lock = _claim_folder(partial)
    except BusyError:
        return
    try:
        remove(partial)
    finally:
        os.close(lock)


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _put(partial: Path, final: Path) -> Path | None:
    """Give the finished folder its name; where the folder that had it is now, if there was one."""
    if not final.is_dir() or not os.listdir(final):
        os.rename(partial, final)
        return None
    if _exchange(partial, final):
        return partial
    # Two steps, where the system has no exchange: `clear_leftovers` mends what is cut off between them.
    aside = _aside(final)
    os.rename(final, aside)
    try:
        os.rename(partial, final)
    except BaseException:
        os.rename(aside, final)
        raise
    return aside


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names at once; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(_HERE, first, _HERE, second, _SWAP)
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(first, second, _SWAP)
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with _explained(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Hashing(io.RawIOBase):
    """A write-only stream over a descriptor that hashes what passes; small pieces go out together."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.sha256 = hashlib.sha256()
        self._descriptor = descriptor
        self._path = path
        self._position = 0
        self._held = bytearray()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: object, /) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        self.sha256.update(view)
        self._position += len(view)
        if len(self._held) + len(view) > _CHUNK:
            self.drain()
        if len(view) > _CHUNK:
            self._out(view)
        else:
            self._held += view
        return len(view)

    def drain(self) -> None:
        """Write what is held; without this it is never written, which an error relies on."""
        self._out(memoryview(bytes(self._held)))
        self._held.clear()

    def _out(self, view: memoryview) -> None:
        done = 0
        with _explained(self._path):
            while done < len(view):
                done += os.write(self._descriptor, view[done:])


def _write_all(out: BinaryIO, data: bytes) -> None:
    for a in range(0, len(data), _CHUNK):
        out.write(memoryview(data)[a : a + _CHUNK])


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns the system's refusals into an error that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UsageError(f"{path}: exists and is not empty; give a new folder") from error
        reason = error.strerror or str(error)
        raise ResourceError(f"{path}: {reason}{_way_out(error.errno, path)}") from error


def _way_out(code: int | None, path: Path) -> str:
    match code:
        case errno.ENOSPC | errno.EDQUOT:
            return "; free some space on that disk, or write elsewhere"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "; give a path that you may write to"
        case errno.ENOTDIR:
            return "; a part of that path is a file: give another one"
        case errno.ENOENT:
            return f"; is the folder {path.parent} there?"
        case _:
            return ""


def _claim_file(partial: Path) -> int:
    """A descriptor of the empty, locked file `partial`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with _explained(partial):
        descriptor = os.open(partial, flags, 0o644)
    try:
        lock(descriptor, partial)
        os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _claim_folder(partial: Path, *, clear: bool = True) -> int:
    """A descriptor of the locked folder `partial`; with `clear`, what a killed process left is removed."""
    with _explained(partial):
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        lock(descriptor, partial)
        with _explained(partial):
            for entry in list(partial.iterdir()) if clear else ():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_free(final: Path, *, replace: bool = False) -> None:
    """Refuses a name that is taken by anything but an empty folder, or with `replace` a folder."""
    with _explained(final):
        if final.is_symlink() or (final.exists() and not final.is_dir()):
            raise UsageError(f"{final}: exists and is not a folder; give a new folder")
        if not replace and final.is_dir() and os.listdir(final):
            raise UsageError(f"{final}: exists and is not empty; give a new folder")


def fsync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    with _explained(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
