"""What a run says on the terminal: progress with an estimate, and nothing where nobody watches."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Protocol, TextIO


class Console(Protocol):
    """Where a run says how far it is."""

    def phase(self, text: str) -> None:
        """A new phase begins."""
        ...

    def progress(self, done: int, total: int, what: str) -> None:
        """`done` of `total` units of this phase are finished, `what` the last."""
        ...


class Terminal:
    """Phases and progress on stderr, one line that is rewritten; silent unless stderr is a terminal."""

    def __init__(self, stream: TextIO | None = None, *, watched: bool | None = None) -> None:
        self.stream = stream or sys.stderr
        self.watched = self.stream.isatty() if watched is None else watched
        self._started = time.monotonic()
        self._name = ""
        self._first: tuple[float, int] | None = None
        self._width = 0

    def phase(self, text: str) -> None:
        """A new phase begins; the last one's line stays with its duration."""
        self.end()
        self._name, self._started, self._first = text, time.monotonic(), None
        self._show(text)

    def progress(self, done: int, total: int, what: str) -> None:
        """`done` of `total` units are finished; the rest is estimated from those of this process."""
        now = time.monotonic()
        if self._first is None:
            # The first unit may have been finished by an earlier process, or pay for compilation.
            self._first = (now, done)
            rest = ""
        else:
            then, before = self._first
            left = (now - then) / max(1, done - before) * (total - done)
            rest = f", about {duration(left)} left" if done < total else ""
        self._show(f"{self._name}  {done}/{total}  {what}{rest}")

    def end(self) -> None:
        """The current phase is over."""
        if self._name and self.watched:
            self._show(f"{self._name}  {duration(time.monotonic() - self._started)}")
            self._write("\n")
        self._name, self._width = "", 0

    def _show(self, text: str) -> None:
        if self.watched:
            self._write("\r" + text[:110].ljust(self._width))
            self._width = min(len(text), 110)

    def _write(self, text: str) -> None:
        """Write to the terminal; one that went away stops nothing."""
        try:
            with suppress(RuntimeError):  # a signal's words, amid a write of ours
                self.stream.write(text)
                self.stream.flush()
        except OSError:
            self.watched = False


def duration(seconds: float) -> str:
    """Seconds as people say them: `48 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
