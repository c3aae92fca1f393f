"""Every error a user can meet, each with the exit code its command ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import ClassVar


class PocketsizeError(Exception):
    """An error that is reported as one line and ends the command with `exit_code`.

    `facts` is what `--json` says besides.
    """

    exit_code: ClassVar[int] = 70
    word: ClassVar[str] = "bug"
    facts: Mapping[str, object] = MappingProxyType({})


class UsageError(PocketsizeError):
    """The command, the recipe or an option is wrong."""

    exit_code = 2
    word = "usage"


class DataError(PocketsizeError):
    """An input file is damaged, incomplete or not what it claims to be."""

    exit_code = 3
    word = "bad-data"


class UnsupportedError(PocketsizeError):
    """The input is sound, but this version cannot do what was asked with it."""

    exit_code = 4
    word = "unsupported"


class ResourceError(PocketsizeError):
    """Memory, disk, time or permission is missing, or a byte budget cannot be met."""

    exit_code = 5
    word = "resources"


class NumericalError(PocketsizeError):
    """A number is NaN or infinite, or a matrix cannot be factorised."""

    exit_code = 6
    word = "numerical"


class IntegrityError(PocketsizeError):
    """A file is not what its manifest, or an unfinished run, says it should be."""

    exit_code = 7
    word = "integrity"


class BusyError(PocketsizeError):
    """Another process is working on the same output."""

    exit_code = 8
    word = "busy"


class RefusedError(PocketsizeError):
    """The input could run code or reach outside its folder, and is not opened."""

    exit_code = 9
    word = "refused"


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop, and did at a point from which the same call goes on.

    In Python it is a KeyboardInterrupt; the command ends with exit code 75.
    """

    exit_code: ClassVar[int] = 75
    word: ClassVar[str] = "stopped"


def what_differs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What two sets of facts do not share, a phrase for each, in the order of `now`."""
    return [
        f"{key} was {before.get(key, 'absent')!r} and is now {now.get(key, 'absent')!r}"
        for key in {**now, **before}
        if before.get(key) != now.get(key)
    ]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint to append to an error: `; did you mean 'group'?`, or the list of known words."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
