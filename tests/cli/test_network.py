"""Who may use the network: `fetch`, and other commands only through `--fetch`, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hub_stand_in
from pocketsize.cli.main import main
from pocketsize.cli.network import OURS, SEAL, seal, unsealed
from tiny import TEXT, write_tiny

REPO, TOKEN = "org/tiny", "hf_canary0123456789"
# Every Python process writes down each name it looks up and each address it connects to, and is refused.
GUARD = """
import os, sys
NAMES = ("connect", "getaddrinfo", "gethostbyname", "gethostbyaddr", "sendto", "sendmsg", "bind")
def refuse(event, args):
    if event.startswith("socket.") and event.split(".")[1] in NAMES:
        with open(os.environ["GUARD_LOG"], "a") as log:
            print(event, args, file=log)
        raise OSError("no network in this test")
sys.addaudithook(refuse)
"""
QUANTIZE = """
import pocketsize as ps
from pocketsize.api import Data
data = Data(("{text}",), ("{text}",), sequences=4, length=32, tokens=256, written=0.0)
result = ps.run("{model}", [ps.Gptq(group=32)], out="{out}", export=["folder"], data=data)
assert result.record.origin.name == "org/tiny", result.record.origin
print(ps.load("{model}").origin.revision)
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_stand_in.StandIn]:
    """A stand-in that holds one tiny model; `main` in this process leaves no traces in the environment."""
    for name in (*SEAL, OURS, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("POCKETSIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    with hub_stand_in.running() as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
        stand_in.add(REPO, write_tiny(tmp_path / "source", "llama"), license="mit")
        yield stand_in


@pytest.fixture(autouse=True)
def _children_import_this_source_tree(source_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", source_env["PYTHONPATH"])


def test_a_model_that_is_not_fetched_is_named_with_the_line_that_fetches_it(
    hub: hub_stand_in.StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text("model: org/tiny\nsteps: [rtn]\n")
    out = ["-o", str(tmp_path / "out")]
    for words in (
        ["inspect", REPO],
        ["quantize", REPO, *out],
        ["shrink", REPO, *out],
        ["run", "r.yaml", *out],
        ["measure", REPO],
        ["verify", REPO],
    ):
        assert main(words) == 2, words
        line = capsys.readouterr().err
        assert line.endswith("not fetched from the hub yet; run: pocketsize fetch org/tiny\n"), line
    assert hub.seen == [] and not (tmp_path / "out").exists()


def test_with_fetch_it_is_fetched_first_and_once(
    hub: hub_stand_in.StandIn, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["inspect", REPO, "--fetch", "--json"]) == 0
    origin = json.loads(capfd.readouterr().out)["origin"]
    commit = hub.repos[REPO].revisions["main"]
    assert (origin["name"], origin["revision"], origin["licence"]) == (REPO, commit, "mit")
    assert hub.requests("/api/")[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert "HF_TOKEN" not in os.environ
    asked = len(hub.seen)
    assert main(["inspect", REPO, "--fetch", "--json"]) == 0
    assert len(hub.seen) == asked


def test_where_fetching_first_fails_the_command_ends_as_the_fetch_did(
    hub: hub_stand_in.StandIn, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.faults["/api/"] = lambda handler: handler.fail(403, "GatedRepo", "Access restricted")
    for words in (["quantize", REPO, "-o", "out"], ["measure", str(tmp_path), "--against", REPO]):
        assert main([*words, "--fetch", "--json"]) == 5
        out, err = capfd.readouterr()
        assert err.count("\n") == 1 and "gated" in err and json.loads(out)["exit_code"] == 5
    assert not (tmp_path / "out").exists()


def test_a_local_folder_comes_before_a_hub_id_of_that_name(
    hub: hub_stand_in.StandIn, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside" / "org" / "tiny").mkdir(parents=True)
    (tmp_path / "beside" / "r.yaml").write_text("model: org/tiny\nsteps: [rtn]\n")
    assert main(["run", "beside/r.yaml", "-o", "out", "--fetch"]) == 3
    assert "beside/org/tiny: neither model.safetensors" in capfd.readouterr().err
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert main(["inspect", REPO, "--fetch"]) == 3
    assert "org/tiny: neither model.safetensors" in capfd.readouterr().err
    assert hub.seen == []


def test_everything_but_fetch_is_offline(hub: hub_stand_in.StandIn, tmp_path: Path) -> None:
    call = [sys.executable, "-m", "pocketsize.cli.main", "fetch", REPO]
    subprocess.run(call, env=unsealed(), check=True, capture_output=True)
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT * 40))
    env = unsealed() | {"GUARD_LOG": str(tmp_path / "log"), "HF_TOKEN": TOKEN}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "guard"), env["PYTHONPATH"]])
    assert "HF_HUB_OFFLINE" not in env
    open_ = "import socket; socket.socket().connect(('127.0.0.1', 9))"
    assert subprocess.run([sys.executable, "-c", open_], env=env, capture_output=True).returncode
    assert "socket.connect" in (tmp_path / "log").read_text()
    (tmp_path / "log").unlink()
    asked = len(hub.seen)
    commit = hub.repos[REPO].revisions["main"]
    code = QUANTIZE.format(text=tmp_path / "text.txt", model=REPO, out=tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == commit
    assert not (tmp_path / "log").exists() and len(hub.seen) == asked
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["origin"]["revision"] == commit and len(record["origin"]["sha256"]) == 64
    assert f"base_model: {REPO}" in (tmp_path / "out" / "README.md").read_text()
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_sealing_drops_the_token_and_can_be_undone_for_a_fetch(
    hub: hub_stand_in.StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("DO_NOT_TRACK", "yes")
    before = dict(os.environ)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    seal(keep_token=True)
    seal(keep_token=True)
    assert (
        os.environ["HF_HUB_OFFLINE"] == "1"
        and all(os.environ[name] for name in SEAL)
        and os.environ["DO_NOT_TRACK"] == "yes"
    )
    assert unsealed() == before
    seal(keep_token=False)
    assert "HF_TOKEN" not in os.environ and "HF_TOKEN" not in unsealed()


def test_the_users_own_offline_switch_holds_for_fetching_first(
    hub: hub_stand_in.StandIn, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["inspect", REPO, "--fetch"]) == 2
    assert "HF_HUB_OFFLINE" in capfd.readouterr().err and hub.seen == []
