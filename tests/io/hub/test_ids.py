"""What a user may type for a hub model, and what is refused."""

from __future__ import annotations

import pytest

from pocketsize.errors import UsageError
from pocketsize.io.hub.ids import HubId, parse_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("typed", "means"),
    [
        ("org/name", HubId("org/name")),
        ("Org-1/Name_2.5b", HubId("Org-1/Name_2.5b")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        (f"org/name@{COMMIT}", HubId("org/name", COMMIT)),
        ("org/name@refs/pr/12", HubId("org/name", "refs/pr/12")),
        ("org/name@feature/x", HubId("org/name", "feature/x")),
        ("org/name/a.gguf", HubId("org/name", None, "a.gguf")),
        ("org/name@v1/Q4/a b.gguf", HubId("org/name", "v1", "Q4/a b.gguf")),
        ("hf://org/name", HubId("org/name")),
        ("hf://models/org/name@v1", HubId("org/name", "v1")),
        ("https://huggingface.co/org/name", HubId("org/name")),
        ("https://huggingface.co/org/name/", HubId("org/name")),
        ("https://hf.co/org/name/tree/v1", HubId("org/name", "v1")),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F3", HubId("org/name", "refs/pr/3")),
        ("https://huggingface.co/org/name/blob/main/a.gguf?x=1", HubId("org/name", "main", "a.gguf")),
        ("https://mirror.example/org/name", HubId("org/name")),
    ],
)
def test_ids_and_addresses(typed: str, means: HubId, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert parse_hub(typed) == means


@pytest.mark.parametrize(
    "typed",
    [
        "name",
        "a/b/c",
        "./a/b",
        "../a/b",
        "/a/b",
        "a/b/",
        "a--b/c",
        "a/..b",
        "a/b.git",
        "a/b@",
        "-a/b",
        "a b/c",
    ],
)
def test_what_is_no_id(typed: str) -> None:
    assert parse_hub(typed) is None


@pytest.mark.parametrize(
    "typed",
    [
        "hf://name",
        "hf://datasets/org/name",
        "https://huggingface.co/datasets/org/name",
        "https://huggingface.co/org",
        "https://huggingface.co/org/name/discussions/1",
        "https://huggingface.co/org/name/blob/main/a.py",
        "https://huggingface.co.evil.example/org/name",
        "http://huggingface.evil/org/name",
        "hf://org/name@v1..v2",
    ],
)
def test_addresses_of_something_else_are_refused(typed: str) -> None:
    with pytest.raises(UsageError):
        parse_hub(typed)


@pytest.mark.parametrize(
    ("repo", "revision", "file"),
    [
        ("a/b", "../x", None),
        ("a/b", "x y", None),
        ("a/b", None, "../a.gguf"),
        ("a/b", None, "/a.gguf"),
        ("a/b", None, "a.bin"),
        ("a/b", None, ".a.gguf"),
        ("../b", None, None),
    ],
)
def test_parts_that_would_leave_the_cache_are_refused(
    repo: str, revision: str | None, file: str | None
) -> None:
    with pytest.raises(UsageError):
        HubId(repo, revision, file)


def test_what_is_typed_is_what_is_printed() -> None:
    for text in ("org/name", "org/name@v1", "org/name@refs/pr/1/a.gguf", "org/name/a.gguf"):
        assert str(parse_hub(text)) == text
