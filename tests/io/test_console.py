from __future__ import annotations

import io

import pytest

from pocketsize.io import console
from pocketsize.io.console import Terminal, duration


def test_quiet_when_nobody_watches() -> None:
    out = io.StringIO()
    terminal = Terminal(out, watched=False)
    terminal.phase("gptq")
    terminal.progress(1, 2, "block 0")
    terminal.end()
    assert out.getvalue() == ""


def test_progress_estimates_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 10.0, 12.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    out = io.StringIO()
    terminal = Terminal(out, watched=True)
    terminal.phase("gptq")
    terminal.progress(1, 5, "block 0")  # at 10 s: may have been resumed or compiled, so no estimate yet
    terminal.progress(2, 5, "block 1")  # 2 s for one unit: 3 more take 6 s
    assert "2/5  block 1, about 6 s left" in out.getvalue()
    terminal.end()
    assert "20 s" in out.getvalue()


def test_a_terminal_that_went_away_stops_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    terminal = Terminal(Gone(), watched=True)
    terminal.phase("gptq")
    terminal.progress(1, 2, "block 0")
    terminal.end()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
