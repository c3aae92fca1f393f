"""Memory for what waits: the tensors that batches hold on to, packed into one piece."""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketsize.models.attention import CausalPanels

ALIGNMENT = 64
SMALL = 1 << 16
# What a process may grow by before the gaps in its heap are given back: pages that come and go cost time.
# By less where the original runs beside, as most of the time is spent otherwise.
SPARE, LESS = 176 << 20, 96 << 20
# What tells the system that pages hold nothing; where there is none, gaps stay memory.
_UNUSED = getattr(mmap, "MADV_DONTNEED", None) if sys.platform == "linux" else None


class Noted(CausalPanels):
    """While it is entered, the larger tensors that torch functions give are noted, not held.

    Views of what is `known` are not, nor is what lies on a GPU, whose allocator has no such holes.
    """

    def __init__(self, known: Sequence[object]) -> None:
        super().__init__()
        self._known = {_memory(one) for one in _tensors(known) if one.is_cpu}
        self._noted: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, *call: Any) -> Any:
        out = super().__torch_function__(*call)
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor) and one.is_cpu and one.nbytes > SMALL:
                self._noted.append(weakref.ref(one))
        return out

    def alive(self) -> list[Tensor]:
        """Those noted since the last call that somebody still holds."""
        found = [one for ref in self._noted if (one := ref()) is not None]
        self._noted.clear()
        return [one for one in found if _memory(one) not in self._known]


def _tensors(known: object) -> Iterator[Tensor]:
    """All tensors in lists, tuples and dictionaries of anything."""
    if isinstance(known, Tensor):
        yield known
    elif isinstance(known, list | tuple | dict):
        for one in known.values() if isinstance(known, dict) else known:
            yield from _tensors(one)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Shelf:
    """Room of `size` bytes; what is moved here gives its part back when its last user is gone.

    The heap may grow by `spare` bytes before its gaps are given back (`tidy`).

    Batches that wait each hold a few of the many tensors that they made. The allocator of glibc cannot put
    an aligned tensor into a gap of its own size, so between such tensors the heap grew without end: 1.4 to
    2.2 GB for 128 x 512 tokens of 135M parameters, instead of 1.0. The room is reserved at once, but is
    memory only where it has been written to.
    """

    def __init__(self, size: int, spare: int = SPARE) -> None:
        own = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
        try:
            self._memory = mmap.mmap(-1, max(size, ALIGNMENT), **own)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise MemoryError(f"can't allocate {size} bytes for what batches hold while they wait") from error
        self._begin = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._end = self._begin + size
        self._free = [(0, size)]
        self._returned: list[tuple[int, int]] = []
        self._heap = Heap(spare)

    def move(self, tensors: Sequence[Tensor]) -> None:
        """Let tensors lie here from now on; what does not fit stays where it is.

        Tensors that share memory go on sharing it, among those given. Views of what is here already, or of
        something larger than themselves, are left alone.
        """
        shared: dict[int, list[Tensor]] = {}
        for one in tensors:
            if not self._begin <= _memory(one) < self._end:
                shared.setdefault(_memory(one), []).append(one)
        for same in shared.values():
            old = torch.empty(0, dtype=torch.uint8).set_(same[0].untyped_storage())
            whole = sum(one.nbytes for one in same) >= old.nbytes
            if not whole or (new := self._take(old.nbytes)) is None:
                continue
            new.copy_(old)
            for one in same:
                place = new.view(one.dtype)
                one.data = place.as_strided(one.shape, one.stride(), one.storage_offset())

    def _take(self, size: int) -> Tensor | None:
        """Bytes in the first gap that is long enough."""
        self._gather()
        length = -(-size // ALIGNMENT) * ALIGNMENT
        for i, (begin, end) in enumerate(self._free):
            if end - begin >= length > 0:
                self._free[i] = (begin + length, end)
                part = (ctypes.c_char * size).from_buffer(self._memory, begin)
                # torch holds on to `part` for as long as any tensor or view lies in it.
                back = weakref.finalize(part, self._returned.append, (begin, begin + length))
                back.atexit = False
                return torch.frombuffer(part, dtype=torch.uint8)
        return None

    def tidy(self, needed: int = 0) -> None:
        """Give back the gaps in the heap if the process has grown; so many bytes are `needed` next.

        Those of this room are filled again by the next batches.
        """
        if self._heap.grown(needed):
            self._heap.give_back()

    def give_back(self) -> None:
        """Give the memory of all gaps back to the system, here and in the heap: nothing waits for a while."""
        self._gather()
        if _UNUSED is not None:
            for begin, end in self._free:
                first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
                if first < last:
                    self._memory.madvise(_UNUSED, first, last - first)
        self._heap.give_back()

    def _gather(self) -> None:
        """Join what came back to the gaps beside it. A part may come back at any moment, so not then."""
        count = len(self._returned)
        gaps = sorted(self._free + self._returned[:count])
        del self._returned[:count]
        self._free = []
        for begin, end in gaps:
            if self._free and self._free[-1][1] == begin:
                self._free[-1] = (self._free[-1][0], end)
            elif end > begin:
                self._free.append((begin, end))


class Heap:
    """Gives the gaps in the heap of this process back to the system; `grown` tells when.

    A tensor that does not fit into the gap of its predecessor leaves one behind: now and then 32 batches in
    a row do, and 200 MB are gone. Only with glibc on Linux; elsewhere it does nothing.
    """

    def __init__(self, spare: int = SPARE) -> None:
        self._trim, self._spare = self._library(), spare
        self._least = 0 if self._trim is None else _resident()

    def _library(self) -> Any:
        """The function that gives gaps back, if there is one."""
        return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def grown(self, needed: int = 0) -> bool:
        """Whether the process has grown by `spare` bytes, or will have with those that are `needed`."""
        if self._trim is None:
            return False
        now = _resident()
        self._least = min(self._least, now)
        return now + needed > self._least + self._spare

    def give_back(self) -> None:
        """Give back what there is."""
        if self._trim is not None:
            self._trim(0)
            self._least = _resident()


def _resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE
