"""Fills what is generated in the pages, from code and records: `python -m docs.generate [--check]`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from docs.describe import PARTS

DOCS = Path(__file__).parent
OPENING = "<!-- generated:"
MARK = re.compile(
    rf"({OPENING} ([\w-]+(?: [\w./-]+)*) -->\n)(?:(?!{OPENING}).)*?(<!-- end of generated -->)", re.DOTALL
)


def filled(text: str, page: Path) -> str:
    """The text of a page with its generated parts as they have to be; a mark that is none is an error."""
    understood = {found.start() for found in MARK.finditer(text)}
    for found in re.finditer(OPENING, text):
        if found.start() not in understood:
            line = text.count("\n", 0, found.start()) + 1
            raise SystemExit(f"{page}:{line}: not `{OPENING} WORD ARGUMENTS -->` on a line, its end below")

    def part(found: re.Match[str]) -> str:
        word, *arguments = found[2].split()
        if word not in PARTS:
            raise SystemExit(f"{page}: nothing generates {word!r}; known: {', '.join(PARTS)}")
        return f"{found[1]}\n{PARTS[word](*arguments).strip()}\n\n{found[3]}"

    return MARK.sub(part, text)


def stale(*, write: bool) -> list[str]:
    """Pages whose generated parts are not as they have to be; `write` mends them."""
    found: list[str] = []
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        fresh = filled(text, page)
        if fresh != text:
            found.append(str(page.relative_to(DOCS.parent)))
            if write:
                page.write_text(fresh, encoding="utf-8")
    return found


def main() -> int:
    """Write the generated parts; with --check, only say whether they are stale."""
    check = "--check" in sys.argv
    pages = stale(write=not check)
    if pages and check:
        print(f"stale: {', '.join(pages)}; run python -m docs.generate")
    return 1 if pages and check else 0


if __name__ == "__main__":
    sys.exit(main())
