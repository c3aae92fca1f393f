"""A console for runs of which a test wants the end, or the middle."""

from __future__ import annotations


class Quiet:
    """A console that says nothing, and may stop the run at a step of a training."""

    def __init__(self, stop: int = 0) -> None:
        self.stop = stop

    def phase(self, text: str) -> None:
        pass

    def progress(self, done: int, total: int, what: str) -> None:
        if self.stop and "loss" in what and done == self.stop:
            raise KeyboardInterrupt
