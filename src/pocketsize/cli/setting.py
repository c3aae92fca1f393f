"""`--set KEY=VALUE` and `--budget`: keys of a recipe, said on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import click

# The keys that say how long a training is.
_BUDGETS = ("tokens", "epochs", "minutes")


def with_set(own: Mapping[str, Any], words: tuple[str, ...]) -> dict[str, Any]:
    """The keys that other options stand for, and those of `--set`; refuses to be told one thing twice."""
    said = _set(words)
    for key in own:
        same = _BUDGETS if key in _BUDGETS else (key,)
        if twice := [name for name in same if name in said]:
            option = "--budget" if key in _BUDGETS else f"--{key}"
            raise click.UsageError(f"--set {twice[0]}=: {option} says that already; give one of them")
    return {**own, **said}


def _set(words: tuple[str, ...]) -> dict[str, Any]:
    """`KEY=VALUE` as keys of a recipe."""
    chosen: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise click.UsageError(f"--set is KEY=VALUE, such as rate=2e-4, got {word!r}")
        if (key := key.strip()) in chosen:
            raise click.UsageError(f"--set {key}= is there twice; give it once")
        chosen[key] = _plain(word, value.strip())
    return chosen


def budget_of(option: str, words: str) -> dict[str, Any]:
    """`3epochs`, `30min` or a number of tokens as the key of a recipe."""
    found = re.fullmatch(
        r"(\d+(?:\.\d+)?)\s*(?:[kmb]|(epochs?)|(min|minutes))?", words.strip(), re.IGNORECASE
    )
    if found is None:
        raise click.UsageError(f"{option}: tokens (500k, 2M), 3epochs or 30min, got {words!r}")
    number, epochs, minutes = found.groups()
    if epochs or minutes:
        return {"epochs" if epochs else "minutes": float(number)}
    return {"tokens": words.strip()}


def _plain(word: str, value: str) -> Any:
    """What a recipe file would make of the text: a number, a truth, nothing, or the text itself."""
    import yaml

    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        raise click.UsageError(f"--set {word}: {value!r} is no value of a recipe file: {said}") from error
    try:
        return float(found) if isinstance(found, str) else found  # YAML takes 1e-4 for a text
    except ValueError:
        return found
