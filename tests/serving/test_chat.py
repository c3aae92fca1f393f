"""A conversation: how it ends, and that a long one goes on."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from pocketsize.cli.main import main
from pocketsize.exporting.gguf.writer import write
from pocketsize.io.llamacpp import LlamaCpp, installed
from pocketsize.models.load import load
from pocketsize.serving import chat
from tiny import write_tiny


class Words:
    """A runtime with 12 tokens of context, a token a word, that repeats the last word it is told."""

    context = 12

    def __init__(self, path: Path, *, threads: int, cache: object = None) -> None:
        self.cache = cache
        self.asked: list[list[str]] = []
        made.append(self)

    def __enter__(self) -> Words:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        return sum(len(message["content"].split()) for message in messages)

    def chat(self, messages: Sequence[Mapping[str, str]], max_tokens: int) -> str:
        assert [m["role"] for m in messages] == [("user", "assistant")[i % 2] for i in range(len(messages))]
        assert self.chat_tokens(messages) + min(max_tokens, 6) <= self.context
        self.asked.append([message["content"] for message in messages])
        return messages[-1]["content"].split()[-1]


made: list[Words] = []


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made.clear()
    monkeypatch.setattr(chat, "LlamaCpp", Words)
    (tmp_path / "a.gguf").write_bytes(b"")
    return tmp_path / "a.gguf"


def asking(*lines: str | type[BaseException]) -> Callable[..., str]:
    """Gives the lines one by one; raises the exceptions among them."""
    left: Iterator[str | type[BaseException]] = iter(lines)

    def ask(*_: object) -> str:
        line = next(left)
        if not isinstance(line, str):
            raise line
        return line

    return ask


@pytest.mark.parametrize("last", [EOFError, KeyboardInterrupt, "", "  ", "exit", "quit"])
def test_a_talk_ends_quietly(
    last: str | type[BaseException],
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(builtins, "input", asking("how are you", last))
    assert main(["chat", str(file)]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == "you" and captured.err == ""


def test_the_oldest_is_forgotten_first(file: Path) -> None:
    told: list[str] = []
    ask = asking("a b c", "d e f", "g h", "")
    chat.converse(file, tokens=4, threads=1, ask=ask, tell=told.append)
    assert told == ["c", "f", "h"]
    assert made[0].asked == [["a b c"], ["a b c", "c", "d e f"], ["d e f", "f", "g h"]]


def test_a_question_that_is_too_long_is_not_the_end(file: Path) -> None:
    told: list[str] = []
    ask = asking("a b", "word " * 9, "c", "")
    chat.converse(file, tokens=4, threads=1, ask=ask, tell=told.append)
    assert told[0::2] == ["b", "c"] and "a context of 12 tokens" in told[1]
    assert made[0].asked[-1] == ["a b", "b", "c"]


def test_answers_longer_than_the_context_leave_room_for_a_question(file: Path) -> None:
    told: list[str] = []
    chat.converse(file, tokens=100, threads=1, ask=asking("a b c d e f", ""), tell=told.append)
    assert told == ["f"]


def test_the_fake_runtime_has_what_the_real_one_has() -> None:
    assert all(hasattr(LlamaCpp, name) for name in dir(Words))


def test_a_cache_is_the_runtimes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, types in (("q8_0", ("q8_0", "q8_0")), ("q8_0/q4_0", ("q8_0", "q4_0"))):
        assert main(["chat", str(file), "--prompt", "hello", "--cache", name]) == 0
        assert made[-1].cache == types
    assert main(["chat", str(file), "--prompt", "hello", "--cache", "kivi-2"]) == 4
    assert "llama.cpp has no cache kivi-2" in capsys.readouterr().err


@pytest.mark.skipif(installed() is None, reason="llama.cpp is not installed")
def test_a_long_talk_with_a_model_goes_on(tmp_path: Path) -> None:
    write(load(write_tiny(tmp_path / "m", "llama")), tmp_path / "m.gguf")
    told: list[str] = []
    ask = asking(*["fox and dog " * 5] * 8, "dog " * 900, "fox", "")
    chat.converse(tmp_path / "m.gguf", tokens=16, threads=1, ask=ask, tell=told.append)
    assert len(told) == 10 and told[8].startswith("(too long: ") and not told[9].startswith("(too long: ")
