"""Fetching from the stand-in: what arrives, what is asked of whom, and what each fault leads to."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download

from hub_stand_in import Handler, StandIn, entry
from pocketsize.cli.main import main
from pocketsize.errors import UsageError
from pocketsize.io.hub.copies import is_copy
from pocketsize.io.publish import staging
from pocketsize.io.source import resolve

REPO, TOKEN = "org/tiny", "hf_canary0123456789"
WEIGHTS = random.Random(0).randbytes(300_000)
# The same but for one bit.
OTHER = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "README.md": b"---\nlicense: mit\n---\n",
    "model.safetensors": WEIGHTS,
}
EXTRA = {"modeling_tiny.py": b"raise SystemExit", "pytorch_model.bin": b"\x80\x04", "m-Q4.gguf": b"GGUF" * 99}


@pytest.fixture
def commit(hub: StandIn) -> str:
    """The commit that the main branch of the tiny repository stands for."""
    return hub.add_files(REPO, FILES | EXTRA, license="mit")


def _fetched(tmp_path: Path) -> list[Path]:
    """All copies that are published."""
    return [path.parent for path in (tmp_path / "cache").rglob("fetched.json") if "partial" not in str(path)]


def test_a_model_arrives_with_what_it_needs_and_nothing_else(
    hub: StandIn, commit: str, tmp_path: Path
) -> None:
    assert main(["fetch", REPO]) == 0
    folder = resolve(REPO)
    assert folder == tmp_path / "cache" / "hub" / "org--tiny" / commit
    assert sorted(os.listdir(folder)) == sorted([*FILES, "fetched.json", "origin.json"])
    assert all((folder / name).read_bytes() == data for name, data in FILES.items())
    said = json.loads((folder / "origin.json").read_text())
    assert said == {"name": REPO, "licence": "mit", "revision": commit}
    listed = {f["name"]: f["sha256"] for f in json.loads((folder / "fetched.json").read_text())["files"]}
    assert listed["model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert {seen.method for seen in hub.seen} == {"GET"}
    assert not hub.requests(".py") and not hub.requests(".bin") and not hub.requests(".gguf")


def test_hashes_are_shown_before_anything_large_is_downloaded(
    hub: StandIn, commit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults["model.safetensors"] = lambda handler: handler.fail(403)
    assert main(["fetch", REPO]) == 5
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if line.endswith("model.safetensors")]
    assert line.split()[:3] == ["300,000", "sha256", hashlib.sha256(WEIGHTS).hexdigest()]


def test_json_is_one_object(hub: StandIn, commit: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", REPO, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["commit"], facts["folder"]) == (REPO, commit, str(resolve(REPO)))
    assert {file["name"] for file in facts["files"]} == {*FILES, "origin.json"}


def test_a_second_fetch_downloads_nothing_and_a_pinned_one_asks_nobody(hub: StandIn, commit: str) -> None:
    assert main(["fetch", REPO]) == 0
    asked = len(hub.seen)
    assert main(["fetch", REPO]) == 0
    assert len(hub.seen) == asked + 1 and "/api/models/" in hub.seen[-1].path
    assert main(["fetch", f"{REPO}@{commit}"]) == 0
    assert len(hub.seen) == asked + 1


def test_a_revision_stays_what_it_was_until_it_is_fetched_again(hub: StandIn, commit: str) -> None:
    hub.add_files(REPO, FILES, revision="v1")
    assert main(["fetch", REPO]) == 0
    newer = hub.add_files(REPO, FILES | {"tokenizer.json": b'{"a": 1}'})
    assert resolve(REPO).name == commit == resolve(f"{REPO}@{commit}").name
    with pytest.raises(
        UsageError, match=r"org/tiny@v1: .*fetched are: org/tiny\); run: pocketsize fetch org/tiny@v1"
    ):
        resolve(f"{REPO}@v1")
    assert main(["fetch", REPO, "--revision", "v1"]) == 0
    assert resolve(f"{REPO}@v1").name == hub.repos[REPO].revisions["v1"]
    assert main(["fetch", REPO]) == 0
    assert resolve(REPO).name == newer and resolve(f"{REPO}@{commit}").name == commit


def test_addresses_and_mirrors(hub: StandIn, commit: str) -> None:
    assert main(["fetch", f"https://huggingface.co/{REPO}/tree/main"]) == 0
    assert resolve(f"hf://{REPO}") == resolve(f"{hub.url}/{REPO}") == resolve(f"{REPO}@main") == resolve(REPO)


def test_a_gguf_file_comes_by_name_into_a_folder_of_its_own(hub: StandIn, commit: str) -> None:
    assert main(["fetch", REPO, "--file", "m-Q4.gguf"]) == 0
    assert not hub.requests("model.safetensors")
    [folder] = [p for p in (Path(os.environ["POCKETSIZE_CACHE"])).rglob("m-Q4.gguf") if p.is_dir()]
    assert (folder / "m-Q4.gguf").read_bytes() == EXTRA["m-Q4.gguf"] and is_copy(folder)
    with pytest.raises(UsageError, match="not fetched"):
        resolve(REPO)


def test_the_token_goes_to_the_hub_alone_and_is_kept_nowhere(
    hub: StandIn,
    commit: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["fetch", REPO]) == 0
    sent = {seen.host: seen.headers.get("authorization") for seen in hub.seen}
    assert sent == {"hub": f"Bearer {TOKEN}", "store": None}
    for path in (tmp_path / "cache").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
    hub.faults["/api/"] = lambda handler: handler.fail(401, "", "Invalid credentials in Authorization header")
    assert main(["fetch", REPO]) == 5
    out, err = capfd.readouterr()
    assert "refuses the token (401)" in err and TOKEN not in out + err


def test_the_token_of_a_login_is_read(hub: StandIn, commit: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    assert main(["fetch", REPO]) == 0
    assert hub.requests("/api/")[0].headers["authorization"] == f"Bearer {TOKEN}"


def test_no_word_about_this_machine_is_sent(hub: StandIn, commit: str) -> None:
    assert main(["fetch", REPO]) == 0
    for seen in hub.seen:
        assert seen.headers["user-agent"].startswith("pocketsize/") and "cookie" not in seen.headers
        assert ";" not in seen.headers["user-agent"]


def test_the_stand_in_is_one_that_the_hubs_own_client_reads(
    hub: StandIn, commit: str, tmp_path: Path
) -> None:
    info = HfApi(endpoint=hub.url).model_info(REPO, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings or []}
    assert info.sha == commit and sizes == {name: len(data) for name, data in (FILES | EXTRA).items()}
    [large] = [file.lfs for file in info.siblings or [] if file.rfilename == "model.safetensors"]
    assert large and large.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    for name in ("config.json", "model.safetensors"):
        path = hf_hub_download(REPO, name, endpoint=hub.url, local_dir=tmp_path / "theirs")
        assert Path(path).read_bytes() == FILES[name]
    assert any(seen.method == "HEAD" for seen in hub.seen)


def test_a_wait_that_the_hub_asks_for_is_kept(
    hub: StandIn, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("pocketsize.io.hub.http.sleep", waits.append)
    answers = iter([True, True, False])
    hub.faults["/api/"] = lambda handler: next(answers, False) and handler.fail(429, Retry_After="7")
    assert main(["fetch", REPO]) == 0
    assert waits == [7, 7]


def test_a_damaged_copy_is_refused_and_mended_by_fetching_what_is_damaged(
    hub: StandIn, commit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", REPO]) == 0
    path = resolve(REPO) / "tokenizer.json"
    path.write_bytes(b"{}  ")
    assert main(["inspect", REPO]) == 7
    line = f"{path}: 4 bytes, 2 were fetched; run: pocketsize fetch {REPO}@{commit}"
    assert line in capsys.readouterr().err
    hub.seen.clear()
    assert main(["fetch", f"{REPO}@{commit}"]) == 0
    assert path.read_bytes() == b"{}" and not hub.requests("model.safetensors")


def test_a_flipped_bit_is_found_by_verify_and_inspect(
    hub: StandIn, commit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", REPO]) == 0 and main(["verify", REPO]) == 0
    path = resolve(REPO) / "model.safetensors"
    path.write_bytes(OTHER)
    assert resolve(REPO) == path.parent
    for word in ("verify", "inspect"):
        assert main([word, REPO]) == 7
        assert f"{path}: its bytes are not those that were fetched" in capsys.readouterr().err
    assert main(["fetch", f"{REPO}@{commit}"]) == 0
    assert path.read_bytes() == WEIGHTS


def _cut(handler: Handler) -> bool:
    """Announce all, send ten bytes, and hang up."""
    begin = int(handler.headers.get("Range", "bytes=0-")[6:-1])
    handler.send_response(206 if begin else 200)
    handler.send_header("Content-Range", f"bytes {begin}-{len(WEIGHTS) - 1}/{len(WEIGHTS)}")
    handler.send_header("Content-Length", str(len(WEIGHTS) - begin))
    handler.end_headers()
    handler.wfile.write(b"" if begin else WEIGHTS[:10])
    handler.close_connection = True
    return True


def _more(handler: Handler) -> bool:
    """Send more than was listed, without saying how much."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(WEIGHTS + b"more")
    return True


def _send(status: int, headers: dict[str, str], body: bytes = b"") -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        handler.reply(status, headers, body)
        return True

    return fault


def _fail(status: int, code: str = "", message: str = "", **headers: str) -> Callable[[Handler], bool]:
    return lambda handler: handler.fail(status, code, message, **headers)


def _listing(**facts: object) -> Callable[[Handler], bool]:
    body = json.dumps({"id": REPO, "sha": "0" * 40, "siblings": []} | facts).encode()
    return _send(200, {"Content-Type": "application/json"}, body)


JSON, PAGE = {"Content-Type": "application/json"}, {"Content-Type": "text/html; charset=utf-8"}
STATED = [entry(name, data) for name, data in FILES.items()]
HUGE = {**entry("model.safetensors", b""), "size": 51_000_000_000}
FAULTS = {
    "gated": ("/api/", _fail(403, "GatedRepo", "Access restricted"), 5, "gated; accept its terms on http"),
    "no access": ("/api/", _fail(403), 5, "gives no access (403)"),
    "disabled": ("/api/", _fail(403, "", "Access to this resource is disabled."), 5, "has disabled it"),
    "rate limit": ("/api/", _fail(429, Retry_After="3600"), 5, "(429); run it again in 3600 s"),
    "rate limit of the hub": ("/api/", _fail(429, RateLimit='"api";r=0;t=299'), 5, "again in 299 s"),
    "hub is down": ("/api/", _fail(503), 5, "answers 503"),
    "hub goes down": ("model.safetensors", _fail(502), 5, "answers 502"),
    "no answer of a hub": ("/api/", _fail(418), 3, "answers 418"),
    "page for the listing": ("/api/", _send(200, PAGE, b"<html>Log in"), 3, "answers with a web page"),
    "page for a file": ("README.md", _send(200, PAGE, b"<html>Log in"), 3, "answers with a web page"),
    "listing not JSON": ("/api/", _send(200, JSON, b"{"), 3, "not sound JSON"),
    "listing cut": (
        "/api/",
        _send(200, JSON | {"Content-Length": "999", "Connection": "close"}, b"{"),
        5,
        "broke off",
    ),
    "listing of something else": ("/api/", _listing(sha="main"), 3, "does not answer as a hub does"),
    "name listed twice": ("/api/", _listing(siblings=[*STATED, STATED[0]]), 3, "'config.json', which is no"),
    "no hash": (
        "/api/",
        _listing(siblings=[{"rfilename": n} for n in FILES]),
        4,
        "no size or hash of config",
    ),
    "too large": ("/api/", _listing(siblings=[*STATED[:3], HUGE]), 4, "model.safetensors has 51.0 GB"),
    "file gone": ("model.safetensors", _fail(404, "EntryNotFound", "Entry not found"), 3, "answers 404"),
    "body cut": ("signature=", _cut, 5, "run it again to go on"),
    "body too long": ("signature=", _more, 7, "longer than the 300000 bytes"),
    "wrong size": ("signature=", _send(200, {}, WEIGHTS[:-1]), 7, "299999 bytes there, 300000 listed"),
    "wrong hash": ("signature=", _send(200, {}, OTHER), 7, "model.safetensors from 127.0.0.1"),
    "wrong hash of a small file": ("tokenizer.json", _send(200, {}, b"[]"), 7, "has another hash, listed is"),
    "listing elsewhere": ("/api/", _send(307, {"Location": "https://evil.example/x"}), 9, "set HF_ENDPOINT"),
    "file without TLS": ("README.md", _send(302, {"Location": "http://evil.example/x"}), 9, "not https://"),
    "circles": ("/resolve", _send(307, {"Location": "/resolve"}), 3, "points in circles"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(
    name: str, hub: StandIn, commit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part, fault, code, words = FAULTS[name]
    hub.faults[part] = fault
    assert main(["fetch", REPO]) == code
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error
    assert _fetched(tmp_path) == []
    hub.faults.clear()
    assert main(["fetch", REPO]) == 0
    assert (resolve(REPO) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("typed", "code", "words"),
    [
        ("org/none", 2, "no such model on 127.0.0.1"),
        ("org/tiny@v9", 2, "no revision 'v9'"),
        ("org/old", 2, "is called org/tiny now; run: pocketsize fetch org/tiny"),
        ("org/tiny/x.gguf", 2, "did you mean 'm-Q4.gguf'"),
        ("org/pickles", 9, "its weights are pickles only (pytorch_model.bin)"),
        ("gpt2", 2, "no hub id (OWNER/NAME"),
        ("datasets/org/x", 2, "no hub id"),
    ],
)
def test_names_that_lead_nowhere(
    typed: str, code: int, words: str, hub: StandIn, commit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.renamed["org/old"] = REPO
    hub.add_files("org/pickles", {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04"})
    assert main(["fetch", typed]) == code
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_listing_elsewhere_gets_no_token(
    hub: StandIn, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.faults["/api/"] = _send(307, {"Location": f"{hub.store}/api/models/{REPO}"})
    assert main(["fetch", REPO]) == 9
    assert [seen.host for seen in hub.seen] == ["hub"]


def test_no_network(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["fetch", REPO]) == 5
    assert "127.0.0.1:9 cannot be reached" in capsys.readouterr().err


def test_a_mirror_without_tls_is_refused(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example")
    assert main(["fetch", REPO]) == 9
    assert (
        "HF_ENDPOINT is 'http://mirror.example'; models come over https:// alone" in capsys.readouterr().err
    )


def test_the_users_offline_switch_holds_for_fetch_too(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["fetch", REPO]) == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err and hub.seen == []


def test_a_full_disk_is_told_before_the_download(
    hub: StandIn, commit: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Usage:
        free = 64 << 20

    monkeypatch.setattr("pocketsize.io.hub.fetch.shutil.disk_usage", lambda path: Usage)
    assert main(["fetch", REPO]) == 5
    assert "67 MB free, org/tiny needs 67 MB more; free some space" in capsys.readouterr().err
    assert not hub.requests("resolve")


def test_two_fetches_of_one_commit_at_a_time(
    hub: StandIn, commit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with staging(tmp_path / "cache" / "hub" / "org--tiny" / commit) as folder:
        (folder / "x").write_bytes(b"")
        assert main(["fetch", REPO]) == 8
    assert "another process is writing it" in capsys.readouterr().err


def test_a_link_where_a_part_should_be_is_not_followed(hub: StandIn, commit: str, tmp_path: Path) -> None:
    partial = tmp_path / "cache" / "hub" / "org--tiny" / f".{commit}.partial"
    partial.mkdir(parents=True)
    (tmp_path / "victim").write_bytes(b"mine")
    (partial / "model.safetensors").symlink_to(tmp_path / "victim")
    assert main(["fetch", REPO]) == 5
    assert (tmp_path / "victim").read_bytes() == b"mine"
