"""What is given for a step, data or a source: options by name, each of a type that it takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pocketsize.errors import UsageError, did_you_mean
from pocketsize.io.console import Console, Terminal
from pocketsize.models.model import Model
from pocketsize.recipes.step import Step
from pocketsize.recipes.table import STEPS

T = TypeVar("T")


def filled(kind: type[T], where: str, options: dict[str, Any]) -> T:
    """A step, data or a source from its options, each of a type that it takes."""
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if unknown := next((key for key in options if key not in known), None):
        raise UsageError(f"{where}: unknown option {unknown!r}{did_you_mean(unknown, known)}")
    _check(kind, where, options)
    try:
        return kind(**options)
    except UsageError as error:
        named = str(error).startswith(tuple(f"{word}: " for word in (where, "data", *STEPS)))
        raise error if named else UsageError(f"{where}: {error}") from error


def check_steps(steps: object) -> tuple[Step, ...]:
    """The steps that a caller in Python gives: a list, options having the types that a recipe asks for."""
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        raise UsageError(f"steps: a list of steps, such as [Gptq(scheme='W4A16')], got {steps!r}")
    for step in steps:
        if type(step) not in STEPS.values():
            raise UsageError(f"steps: steps are objects such as Gptq(scheme='W4A16'), got {step!r}")
        _check(type(step), step.kind, {f.name: getattr(step, f.name) for f in fields(step)})
    return tuple(steps)


def source_of(model: str | Path | Model) -> str:
    """The folder or the name of a model; refuses one that is no longer what its folder holds."""
    if not isinstance(model, str | Path | Model):
        raise UsageError(f"model: a folder, a hub id, a sample or what `load` gave, got {model!r}")
    if isinstance(model, Model) and (model.changed or model.quantized):
        name = next(iter({**model.changed, **model.quantized}))
        raise UsageError(
            f"model: stands for its folder {model.folder}, which has nothing of the change to {name}; write "
            "the changed model to a folder, and give that"
        )
    return str(model.folder) if isinstance(model, Model) else str(model)


def folder_of(given: object, name: str) -> Path:
    """The folder of this argument."""
    if not isinstance(given, str | Path):
        raise UsageError(f"{name}: a folder, got {given!r}")
    return Path(given)


def terminal_of(given: Console | None) -> Console:
    """Where a run says how far it is: what a caller gives, or the terminal."""
    if given is not None and not all(callable(getattr(given, name, None)) for name in ("phase", "progress")):
        raise UsageError(f"console: needs phase(text) and progress(done, total, what), got {given!r}")
    return given or Terminal()


def _check(kind: type, where: str, options: Mapping[str, Any]) -> None:
    hints = get_type_hints(kind)
    for key, value in options.items():
        if not _fits(value, hints[key]):
            share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", str(value)) if _fits(0.5, hints[key]) else None
            hint = f"; write {float(share[1]) / 100:g}" if share else ""
            raise UsageError(f"{where}: {key} is {_words(hints[key])}, got {value!r}{hint}")


def _alternatives(hint: Any) -> Iterator[Any]:
    """The plain types and values that a type hint stands for."""
    if get_origin(hint) in (Union, UnionType, Literal):
        for one in get_args(hint):
            yield from _alternatives(one)
    else:
        yield hint


def _fits(value: object, hint: Any) -> bool:
    """Whether a value from YAML is what a hint says: no text for a switch, no switch for a number."""
    return any(_is(value, one) for one in _alternatives(hint))


def _is(value: object, one: Any) -> bool:
    if (kind := get_origin(one)) in (tuple, Mapping):  # what is in it is looked at where it is used
        return isinstance(value, (list, tuple) if kind is tuple else kind)
    if not isinstance(one, type):
        return isinstance(value, str) and value == one
    if isinstance(value, bool):
        return one is bool
    return isinstance(value, (int, float) if one is float else one)


_MANY = {Mapping: "options by name", tuple: "a list"}


def _words(hint: Any) -> str:
    """The alternatives as a user writes them."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    return ", or ".join(
        names.get(one) or _MANY.get(get_origin(one) or one, "a list") if not isinstance(one, str) else one
        for one in _alternatives(hint)
    )
