"""Ctrl-C and SIGTERM: a run ends at the next point from which nothing has to be done twice."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from pocketsize.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class Stop:
    """Whether a stop was asked for, and where one may happen.

    Layers are finished first. Work that no step of is kept on the way (loading, measuring,
    exporting) is left at once: waiting for its end would save nothing.
    """

    asked: bool = False
    leaving: str = ""

    def safe_point(self, where: str) -> None:
        """A point at which nothing is lost: ends the run here if a stop was asked for."""
        if self.asked:
            raise Stopped(f"stopped {where}; nothing is lost: the same command goes on from there")

    @contextmanager
    def at_once(self, what: str) -> Iterator[None]:
        """Work that is left as soon as a stop is asked for."""
        self.safe_point(f"before {what}")
        self.leaving = what
        try:
            yield
        finally:
            self.leaving = ""


@contextmanager
def stopping(say: Callable[[str], None]) -> Iterator[Stop]:
    """Listen to the first SIGINT or SIGTERM, in the main thread; the next does what it did before.

    Handlers are put back at the end. A signal that is ignored (as under nohup) stays ignored.
    """
    stop, before = Stop(), {}

    def restore() -> None:
        while before:
            number, handler = before.popitem()
            signal.signal(number, handler)

    def asked(number: int, frame: FrameType | None) -> None:
        restore()
        stop.asked = True
        if stop.leaving:
            stop.safe_point(f"during {stop.leaving}")
        say("finishing what is in work, then stopping (Ctrl-C again: at once)")

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN):
                before[number] = handler
                signal.signal(number, asked)
    try:
        yield stop
    finally:
        restore()
