"""Called by mkdocs: tables wider than the page scroll by themselves; an index for the search is written."""

from __future__ import annotations

import json
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

_entries: list[dict[str, str]] = []
SKIPPED = {"script", "style"}


def on_pre_build(config: Any) -> None:
    """A build begins with an empty index."""
    _entries.clear()


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Tables in a box that scrolls, reachable by keyboard; the page's sections go into the index."""
    sections = _Sections(page.title)
    sections.feed(html)
    for title, anchor, words in sections.found:
        url = page.url + (f"#{anchor}" if anchor else "")
        _entries.append({"title": title, "url": posixpath.normpath(url), "text": " ".join(words)})
    return re.sub(r"<table>.*?</table>", _boxed, html, flags=re.DOTALL)


def on_post_build(config: Any) -> None:
    """The index, as a script: a page that is read from a disk may load no other file."""
    text = json.dumps(_entries, ensure_ascii=False, separators=(",", ":"))
    Path(config["site_dir"], "search.js").write_text(f"window.PAGES={text};\n", encoding="utf-8")
    for name in ("sitemap.xml", "sitemap.xml.gz"):  # of a site that has no address
        Path(config["site_dir"], name).unlink(missing_ok=True)


def _boxed(found: re.Match[str]) -> str:
    """A table in its box; one of words with three columns or more becomes a list of cards on a phone."""
    table = found[0]
    headings = [re.sub(r"<[^>]+>", "", h) for h in re.findall(r"<th[^>]*>(.*?)</th>", table, re.DOTALL)]
    if len(headings) >= 3 and "text-align: right" not in table:
        rows = re.sub(
            r"<tr>(.*?)</tr>", lambda row: f"<tr>{_labelled(row[1], headings)}</tr>", table, flags=re.DOTALL
        )
        table = rows.replace("<table>", '<table class="cards">')
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Table">{table}</div>'


def _labelled(row: str, headings: list[str]) -> str:
    """The cells of a row, each with the heading of its column."""
    names = iter(headings)
    return re.sub(r"<td>", lambda _: f'<td data-label="{next(names)}">', row)


class _Sections(HTMLParser):
    """The text of a page by its second headings: title, anchor, words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.page = page
        self.found: list[tuple[str, str, list[str]]] = [(page, "", [])]
        self.heading = False
        self.skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A second or third heading opens a section."""
        named = dict(attrs)
        self.skipped += tag in SKIPPED or named.get("class") == "headerlink"
        if tag in ("h2", "h3"):
            self.heading = True
            self.found.append(("", named.get("id") or "", []))

    def handle_endtag(self, tag: str) -> None:
        """The heading is over, and with it the section's title."""
        if self.skipped and tag in (*SKIPPED, "a"):
            self.skipped -= 1
        if tag in ("h2", "h3"):
            self.heading = False

    def handle_data(self, data: str) -> None:
        """Words of a heading or of the section below it."""
        if self.skipped or not data.strip():
            return
        title, anchor, words = self.found[-1]
        if self.heading:
            said = f"{title} {data.strip()}" if title else f"{self.page}: {data.strip()}"
            self.found[-1] = (said, anchor, words)
        else:
            words.append(" ".join(data.split()))
