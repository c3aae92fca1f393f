"""The first signal ends a run at a safe point; nothing of that outlives the call."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from pocketsize.errors import Stopped
from pocketsize.recipes.stop import SIGNALS, stopping


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever a test does, the handlers are what they were."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_work_goes_on_to_the_next_safe_point(number: signal.Signals) -> None:
    said: list[str] = []
    with (
        pytest.raises(Stopped, match="stopped after layer 3; nothing is lost"),
        stopping(said.append) as stop,
    ):
        stop.safe_point("after layer 2")
        signal.raise_signal(number)
        assert said == ["finishing what is in work, then stopping (Ctrl-C again: at once)"]
        stop.safe_point("after layer 3")
    assert issubclass(Stopped, KeyboardInterrupt) and Stopped.exit_code == 75


def test_work_of_which_nothing_is_kept_is_left_at_once() -> None:
    with pytest.raises(Stopped, match="during measure"), stopping(print) as stop, stop.at_once("measure"):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("must not be reached")


def test_no_phase_begins_once_a_stop_is_asked_for() -> None:
    with pytest.raises(Stopped, match="before measure"), stopping(lambda text: None) as stop:
        signal.raise_signal(signal.SIGTERM)
        with stop.at_once("measure"):
            pytest.fail("must not begin")


def test_a_second_ctrl_c_does_what_it_did_before() -> None:
    with pytest.raises(KeyboardInterrupt) as error, stopping(lambda text: None):
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(error.value, Stopped)


def test_work_that_ends_before_the_next_safe_point_is_done() -> None:
    with stopping(lambda text: None):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping(print) as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone() -> None:
    found: list[object] = []

    def work() -> None:
        with stopping(print):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
