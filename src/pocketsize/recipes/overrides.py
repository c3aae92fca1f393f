"""What the overrides of a step decide: patterns of names of linears, whole names of embedding and head."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pocketsize.errors import UnsupportedError
from pocketsize.models.model import Model

Overrides = Mapping[str, Any]


def module_of(name: str) -> str:
    """The module of a parameter."""
    return name.removesuffix(".weight")


def decides(overrides: Overrides, name: str) -> str | None:
    """The pattern that says what a linear has: the last that matches its name, with or without `.weight`."""
    return next((p for p in reversed([*overrides]) if matches(p, module_of(name))), None)


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern, a regular expression after `re:`, else a glob, stands for a module."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern.removeprefix("re:"), module) is not None
    return fnmatchcase(module, module_of(pattern))


def matched(overrides: Overrides, model: Model) -> dict[str | None, list[str]]:
    """Which matrices each pattern decides; under None the linears that none does."""
    names: dict[str | None, list[str]] = {None: [], **{pattern: [] for pattern in overrides}}
    for name in model.linears:
        names[decides(overrides, name)].append(name)
    for name in model.ends:
        if module_of(name) in overrides:
            names[module_of(name)].append(name)
    return names


def require_packed(where: str, names: Sequence[str], model: Model, exports: tuple[str, ...]) -> None:
    """Refuse to leave experts as they are beside what is quantized, which stock transformers cannot load."""
    left = [name for name in names if model.arch.is_expert(name)]
    if left and "folder" in exports:
        raise UnsupportedError(
            f"{where}: leaves {module_of(left[0])}, and transformers loads no {model.config.model_type} of "
            "which experts are left as they are; give them a scheme such as W8A16"
        )
