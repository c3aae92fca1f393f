"""Chats as text: what the tokenizer's own template gives, and what a template may not do."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pocketsize.data import chat
from pocketsize.data.chat import chat_renderer
from pocketsize.data.text import read_corpus
from pocketsize.errors import DataError, PocketsizeError, RefusedError, UnsupportedError
from pocketsize.models.load import load, tokenizer_of
from tiny import write_tiny

CHATS = [
    [{"role": "user", "content": "Größe?\n"}, {"role": "assistant", "content": "東京 🙂"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "{{ 1 + 1 }}"}],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("chat") / "model", "llama")


def test_the_text_is_what_the_tokenizer_gives(folder: Path) -> None:
    tokenizer = tokenizer_of(load(folder))
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.first %}[{% endif %}{{ m.role | upper }}: "
        "{{ m.content | trim | tojson }}{{ eos_token }}\n{% endfor %}"
    )
    named = [(f"row {i}", messages) for i, messages in enumerate(CHATS)]
    expected = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in CHATS]
    assert chat_renderer(tokenizer, folder)(named) == expected and "東京" in expected[0]


def test_rows_of_text_and_of_chats_keep_their_order(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"messages": CHATS[0]}, {"text": "two"}, {"messages": CHATS[1]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer_of(load(folder))
    corpus = read_corpus(["a.jsonl"], tmp_path, chat_renderer(tokenizer, folder))
    first, second = (tokenizer.apply_chat_template(messages, tokenize=False) for messages in CHATS)
    assert [d.text for d in corpus.documents] == ["one", first, "two", second]


def test_no_template(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "bert")
    render = chat_renderer(tokenizer_of(load(folder)), folder)
    with pytest.raises(
        UnsupportedError, match=r"row 1: a chat, and the tokenizer in .* has no chat template"
    ):
        render([("row 1", CHATS[0])])


BAD: dict[str, tuple[str | dict[str, str], type[PocketsizeError], str]] = {
    "syntax": ("{{ messages }}\n{% for %}", DataError, "cannot render it: line 2"),
    "unknown name": ("{{ messages[0].content.nothing.here }}", DataError, "UndefinedError"),
    "its own refusal": ("{{ raise_exception('roles must alternate') }}", DataError, "roles must alternate"),
    "no text": ("{% set x = 1 %}", DataError, "gives no text"),
    "no default": ({"a": "x", "b": "y"}, UnsupportedError, "multiple chat templates"),
    "escape": ("{{ ''.__class__.__mro__ }}", RefusedError, "__class__"),
    "escape by filter": (
        "{{ messages | attr('__class__') }}x{{ messages.__init__.__globals__ }}",
        RefusedError,
        "",
    ),
    "changes its input": ("{{ messages.append(1) }}", RefusedError, "append"),
    "huge text": ("{{ 'a' * 900000000 }}", RefusedError, "takes too much memory"),
    "large text": ("{{ 'a' * 2000000 }}", RefusedError, "gives 2000000 characters"),
    "huge template": ("a" * 70_000, RefusedError, "a chat template of 70000 bytes"),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a %}{% endfor %}{% endfor %}",
        RefusedError,
        "takes more than",
    ),
    "endless macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", DataError, "RecursionError"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_templates(fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "ROW_SECONDS", 0.5)
    template, kind, words = BAD[fault]
    tokenizer = tokenizer_of(load(folder))
    tokenizer.chat_template = template  # type: ignore[assignment]
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        chat_renderer(tokenizer, folder)([("a.jsonl: line 7", CHATS[0])])
    assert str(folder) in str(caught.value) and words in str(caught.value), caught.value
    assert time.monotonic() - start < 20 and "\n" not in str(caught.value)


def test_the_row_that_cannot_be_rendered_is_named(folder: Path) -> None:
    tokenizer = tokenizer_of(load(folder))
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}a"
    with pytest.raises(DataError, match=r"line 2: the chat template .* cannot render it: TemplateError: no"):
        chat_renderer(tokenizer, folder)([("line 1", CHATS[0]), ("line 2", CHATS[1])])
