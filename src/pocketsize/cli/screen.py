"""Where commands print for people."""

from __future__ import annotations

from rich.console import Console

_UNBOUNDED = 10_000


def screen() -> Console:
    """The standard output: names are printed as they are, and no line is cut where it is piped."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console
