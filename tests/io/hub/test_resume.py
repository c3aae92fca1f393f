"""A download that was cut off goes on where it was, and ends with the right bytes whatever was there."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hub_stand_in import Handler, StandIn
from pocketsize.cli.main import main
from pocketsize.io.source import resolve

REPO = "org/large"
WEIGHTS = random.Random(1).randbytes(4_000_000)
HALF = len(WEIGHTS) // 2
FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": WEIGHTS}


@pytest.fixture
def partial(hub: StandIn, tmp_path: Path) -> Path:
    """Where the unfinished weights of the repository are kept."""
    commit = hub.add_files(REPO, FILES)
    return tmp_path / "cache" / "hub" / "org--large" / f".{commit}.partial" / "model.safetensors"


def _begin(handler: Handler, count: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(WEIGHTS)))
    handler.end_headers()
    handler.wfile.write(WEIGHTS[:count])
    handler.wfile.flush()
    handler.close_connection = True


def _ranges(hub: StandIn) -> list[str | None]:
    return [seen.headers.get("range") for seen in hub.requests("signature=")]


def _require_right() -> None:
    assert (resolve(REPO) / "model.safetensors").read_bytes() == WEIGHTS


def test_killed_half_way_it_goes_on_where_it_was(
    hub: StandIn, partial: Path, source_env: dict[str, str]
) -> None:
    release = threading.Event()

    def stall(handler: Handler) -> bool:
        _begin(handler, HALF)
        release.wait(30)
        return True

    hub.faults["signature="] = stall
    env = {name: value for name, value in source_env.items() if name != "HF_HUB_OFFLINE"}
    call = [sys.executable, "-m", "pocketsize.cli.main", "fetch", REPO]
    child = subprocess.Popen(call, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size >= HALF):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    release.set()
    assert partial.stat().st_size == HALF
    hub.faults.clear()
    hub.seen.clear()
    hub.sent_bytes = 0
    subprocess.run(call, env=env, check=True, capture_output=True)
    assert _ranges(hub) == [f"bytes={HALF}-"]
    # The small files were whole, so beside the rest of the weights only the listing came again.
    assert not hub.requests("tokenizer.json") and len(WEIGHTS) - HALF <= hub.sent_bytes < HALF + 10_000
    _require_right()
    assert not partial.parent.exists()


def test_a_connection_that_breaks_again_and_again_is_taken_up_each_time(hub: StandIn, partial: Path) -> None:
    def drip(handler: Handler) -> bool:
        begin = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        handler.send_response(206 if begin else 200)
        handler.send_header("Content-Range", f"bytes {begin}-{len(WEIGHTS) - 1}/{len(WEIGHTS)}")
        handler.send_header("Content-Length", str(len(WEIGHTS) - begin))
        handler.end_headers()
        handler.wfile.write(WEIGHTS[begin : begin + 500_000])
        handler.close_connection = True
        return True

    hub.faults["signature="] = drip
    assert main(["fetch", REPO]) == 0
    assert len(_ranges(hub)) == 8
    _require_right()


def test_a_host_without_ranges_sends_it_all_again(hub: StandIn, partial: Path) -> None:
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WEIGHTS[:HALF])

    def whole(handler: Handler) -> bool:
        _begin(handler, len(WEIGHTS))
        return True

    hub.faults["signature="] = whole
    assert main(["fetch", REPO]) == 0
    assert _ranges(hub) == [f"bytes={HALF}-"]
    _require_right()


@pytest.mark.parametrize(
    ("left", "ranges"),
    [
        pytest.param(b"?" * HALF, [f"bytes={HALF}-", None], id="of another file"),
        pytest.param(b"?" * len(WEIGHTS), [None], id="as long, with other bytes"),
        pytest.param(WEIGHTS + b"?", [None], id="too long"),
        pytest.param(WEIGHTS, [], id="whole"),
    ],
)
def test_what_is_there_is_checked_like_the_rest(
    hub: StandIn, partial: Path, left: bytes, ranges: list[str | None]
) -> None:
    partial.parent.mkdir(parents=True)
    partial.write_bytes(left)
    (partial.parent / "stranger.py").write_bytes(b"raise SystemExit")
    assert main(["fetch", REPO]) == 0
    assert _ranges(hub) == ranges
    _require_right()
    assert not (resolve(REPO) / "stranger.py").exists()


def test_an_answer_from_another_byte_on_is_refused(
    hub: StandIn, partial: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WEIGHTS[:HALF])

    def shifted(handler: Handler) -> bool:
        extent = {"Content-Range": f"bytes {HALF - 1}-{len(WEIGHTS) - 1}/{len(WEIGHTS)}"}
        handler.reply(206, extent, WEIGHTS[HALF - 1 :])
        return True

    hub.faults["signature="] = shifted
    assert main(["fetch", REPO]) == 3
    assert f"asked from byte {HALF} on" in capsys.readouterr().err
