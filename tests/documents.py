"""What documents show: blocks of code by language, commands, links, and names of the API in Python blocks."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
import shlex
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Programs that load what we write, and are not in the environment of the tests.
PEERS = {"gptqmodel"}
FENCE = re.compile(r"^([ \t]*)```(\w*)[^\n]*\n(.*?)^\1```[ \t]*$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^\n|\A)((?: {4}\S[^\n]*\n)+)", re.MULTILINE)
INLINE = re.compile(r"`(pocketsize [^`\n]+)`")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
BETWEEN = {"&&", "||", "|", ";", "&"}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language, its text."""

    where: str
    language: str
    text: str


def pages() -> list[Path]:
    """All documents that people read."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [
        *found,
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "benchmarks").glob("*/README.md")),
    ]


def blocks(language: str) -> list[Block]:
    """All fenced blocks of a language."""
    found = []
    for page in pages():
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match[2] == language:
                line = text[: match.start()].count("\n") + 1
                body = "".join(part.removeprefix(match[1]) for part in match[3].splitlines(keepends=True))
                found.append(Block(f"{page.relative_to(ROOT)}:{line}", language, body))
    return found


def commands() -> list[tuple[str, list[str], bool]]:
    """Commands that are shown: where, their words, and whether they stand whole (not inside a sentence)."""
    found = []
    for block in blocks("sh"):
        found += [(block.where, words, True) for words in _simple(block.text)]
    for page in pages():
        text, where = FENCE.sub("", page.read_text()), str(page.relative_to(ROOT))
        for match in INDENTED.finditer(text):
            shown = "".join(line for line in match[1].splitlines(keepends=True) if _is_shell(line))
            found += [(where, words, True) for words in _simple(shown)]
        found += [(where, words, False) for match in INLINE.finditer(text) for words in _simple(match[1])]
    return found


def _is_shell(line: str) -> bool:
    return line.split()[0] in ("pocketsize", "python", "make")


def _simple(text: str) -> Iterator[list[str]]:
    """The simple commands of shell text, comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if word in BETWEEN:
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


def links(page: Path) -> list[str]:
    """Addresses that a page links to, those in code left out."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    return LINK.findall(text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}


class Names:
    """Follows the names of a piece of Python through our own types, and says which do not exist.

    What it cannot follow it lets pass: `None` stands for a value of unknown type.
    """

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.wrong: list[str] = []
        self.followed = 0

    def read(self, text: str) -> list[str]:
        """Complaints about a whole block."""
        for statement in ast.parse(text).body:
            self._statement(statement)
        return self.wrong

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Import():
                for alias in node.names:
                    self.known[alias.asname or alias.name] = _Is(importlib.import_module(alias.name))
            case ast.ImportFrom() if node.module in PEERS:
                self.known |= dict.fromkeys(alias.asname or alias.name for alias in node.names)
            case ast.ImportFrom():
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    self.known[alias.asname or alias.name] = self._attribute(_Is(module), alias.name)
            case ast.Assign(targets=[ast.Name(id=name)]):
                self.known[name] = self._type(node.value)
            case ast.For() | ast.With():
                self._enter(node)
                for part in node.body:
                    self._statement(part)
            case _:
                for part in ast.iter_child_nodes(node):
                    if isinstance(part, ast.expr):
                        self._type(part)

    def _enter(self, node: ast.For | ast.With) -> None:
        """The names that hold in the body of a loop, or of `with`, whose values are not followed."""
        if isinstance(node, ast.For):
            self._bind(node.target, self._type(node.iter))
            return
        for item in node.items:
            self._type(item.context_expr)
            names = ast.walk(item.optional_vars) if item.optional_vars else ()
            self.known |= {name.id: None for name in names if isinstance(name, ast.Name)}

    def _bind(self, target: ast.expr, iterated: Any) -> None:
        if isinstance(target, ast.Name):
            self.known[target.id] = _element(iterated)

    def _type(self, node: ast.expr) -> Any:
        match node:
            case ast.Name():
                assert node.id in self.known or hasattr(builtins, node.id), f"{node.id} is not defined"
                return self.known.get(node.id)
            case ast.Attribute():
                return self._attribute(self._type(node.value), node.attr)
            case ast.Call():
                return self._call(node)
            case ast.Subscript():
                owner = self._type(node.value)
                self._type(node.slice)
                return _element(owner)
            case ast.ListComp() | ast.GeneratorExp():
                for part in node.generators:
                    self._bind(part.target, self._type(part.iter))
                return list[self._type(node.elt) or object]
            case ast.Lambda():
                return None
            case _:
                for part in ast.iter_child_nodes(node):
                    if isinstance(part, ast.expr):
                        self._type(part)
                return None

    def _call(self, node: ast.Call) -> Any:
        called = self._type(node.func)
        given = [self._type(argument) for argument in node.args]
        for keyword in node.keywords:
            self._type(keyword.value)
        if isinstance(node.func, ast.Name) and node.func.id == "sorted":
            return given[0]
        if not isinstance(called, _Is) or not callable(called.item) or not _ours(called.item):
            return None
        names = {k.arg: None for k in node.keywords if k.arg}
        try:
            inspect.signature(called.item).bind(*given, **names)
        except TypeError as error:
            self.wrong.append(f"{ast.unparse(node)}: {error}")
        self.followed += 1
        if isinstance(called.item, type):
            return called.item
        return typing.get_type_hints(called.item).get("return")

    def _attribute(self, owner: Any, name: str) -> Any:
        if isinstance(owner, _Is):
            if not hasattr(owner.item, name):
                self.wrong.append(f"{owner.item!r} has no {name}")
                return None
            self.followed += 1
            return _Is(getattr(owner.item, name))
        if not isinstance(owner, type) or not is_dataclass(owner):
            return None
        found = getattr(owner, name, None)
        if found is None and name not in {f.name for f in fields(owner)}:
            self.wrong.append(f"{owner.__name__} has no {name}")
            return None
        self.followed += 1
        if isinstance(found, property):
            return typing.get_type_hints(found.fget).get("return")
        return _Is(found) if inspect.isfunction(found) else typing.get_type_hints(owner).get(name)


@dataclass(frozen=True)
class _Is:
    """A name for a thing itself (a module, a class, a function), not for a value of a type."""

    item: Any


def _ours(item: Any) -> bool:
    return str(getattr(item, "__module__", "")).split(".")[0] == "pocketsize"


def _element(kind: Any) -> Any:
    """What iterating over, or looking something up in, a value of a type gives."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (tuple, list) and arguments:
        return arguments[0]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return arguments[1]
    return None if not isinstance(kind, types.GenericAlias) else arguments[0]
