"""Checks the built site: `python -m docs.check_site [site]`. Nothing is fetched.

Every link inside it leads to a file and an anchor that are there; no page, style or script loads
anything from elsewhere; no Markdown is left unread. Links that lead out are listed.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

DOCS = Path(__file__).parent
# What a browser loads by itself, by tag; everything else with an address waits for a click.
LOADS = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src", "srcdoc"),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "video": ("src", "poster"),
    "form": ("action",),
    "base": ("href",),
}
FOREIGN = re.compile(r"(?:https?:|wss?:|ftp:)?//[\w.-]+\.[a-z]{2,}", re.IGNORECASE)
# The name of SVG is written as an address, and never opened.
NAMES = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink", "http://www.w3.org/1998/Math/MathML")
VERBATIM = {"code", "pre", "script", "style"}
# A fence, a link, a table's rule or a heading that was not understood, as a fence inside a list.
UNREAD = re.compile(r"```|\]\(|\| --- \||^#{1,6} \S")


@dataclass
class Found(HTMLParser):
    """What a page links to, loads, and can be jumped to."""

    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    anchors: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    code: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect addresses and ids of one element."""
        self.code += tag in VERBATIM
        for name, value in attrs:
            if not value:
                continue
            if name == "id":
                self.anchors.append(value)
            elif tag == "a" and name == "href":
                self.links.append(value)
            elif name in LOADS.get(tag, ()):
                self.loads.append(value)
            elif name == "style" or name.startswith("on"):
                self.loads += FOREIGN.findall(value)

    def handle_endtag(self, tag: str) -> None:
        """Leave what is shown as it is."""
        self.code -= tag in VERBATIM

    def handle_data(self, data: str) -> None:
        """Collect lines with Markdown that became no element."""
        if not self.code:
            self.unread += [line.strip() for line in data.splitlines() if UNREAD.search(line)]


def complaints(site: Path) -> tuple[list[str], list[str]]:
    """What is wrong with a built site, and the links that lead out of it."""
    pages = {path.resolve(): _read(path) for path in sorted(site.rglob("*.html"))}
    wrong = [f"{site}: no pages"] if not pages else []
    outside: set[str] = set()
    for path, found in pages.items():
        name = path.relative_to(site.resolve())
        wrong += [f"{name}: the anchor {a!r} twice" for a in sorted(_twice(found.anchors))]
        wrong += [f"{name}: Markdown left unread: {line[:60]}" for line in found.unread]
        for link in found.links:
            if urlsplit(link).scheme or link.startswith("//"):
                outside.add(link)
            elif said := _broken(link, path, site.resolve(), pages):
                wrong.append(f"{name}: {link}: {said}")
        for address in found.loads:
            if urlsplit(address).scheme or address.startswith("//"):
                wrong.append(f"{name}: loads {address}")
            elif said := _broken(address, path, site.resolve(), pages):
                wrong.append(f"{name}: {address}: {said}")
    for path in sorted((*site.rglob("*.css"), *site.rglob("*.js"), *site.rglob("*.svg"))):
        wrong += [f"{path.relative_to(site)}: names {address}" for address in _foreign(path)]
    return wrong, sorted(outside)


def _read(path: Path) -> Found:
    found = Found()
    found.feed(path.read_text(encoding="utf-8"))
    return found


def _twice(anchors: list[str]) -> set[str]:
    return {anchor for anchor in anchors if anchors.count(anchor) > 1}


def _broken(link: str, page: Path, site: Path, pages: dict[Path, Found]) -> str:
    """Why a link inside the site leads nowhere; empty where it does not."""
    parts = urlsplit(link)
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.is_relative_to(site):
        return "leads out of the site"
    if not target.is_file():
        return "no such file"
    if parts.fragment and (target not in pages or unquote(parts.fragment) not in pages[target].anchors):
        return "no such anchor"
    return ""


def _foreign(path: Path) -> list[str]:
    """Addresses of other hosts in a style, script or picture; the index of the search is text, not code."""
    if path.name == "search.js":
        return []
    text = path.read_text(encoding="utf-8")
    for name in NAMES:
        text = text.replace(name, "")
    return FOREIGN.findall(text)


def main() -> int:
    """Complain, or say how much was looked at."""
    site = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS.parent / "site"
    wrong, outside = complaints(site)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    pages = len(list(site.rglob("*.html")))
    print(f"{site}: {pages} pages, {len(wrong)} complaints, {len(outside)} links that lead out (not fetched)")
    print(*(f"  {link}" for link in outside), sep="\n", end="\n" if outside else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
