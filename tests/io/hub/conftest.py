"""A stand-in hub, a cache of its own, and a huggingface_hub that sees both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import hub_stand_in
from pocketsize.cli.network import OURS, SEAL


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_stand_in.StandIn]:
    """The stand-in, which HF_ENDPOINT names; nobody is logged in, and no wait takes time."""
    close_session()
    # What `main` sets in this process for other commands is undone for this test, and after it.
    for name in (*SEAL, OURS):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("POCKETSIZE_CACHE", str(tmp_path / "cache"))
    # Read once, when huggingface_hub is imported; another test may have been offline then.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    # The hub's own client, which one test uses, would ask the real hub for a list.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("pocketsize.io.hub.http.sleep", lambda seconds: None)
    with hub_stand_in.running() as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
        yield stand_in
        close_session()
