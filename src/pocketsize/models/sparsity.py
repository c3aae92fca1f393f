"""What a config says of the zeros of a model's linears, held against the linears."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pocketsize.errors import DataError, UsageError
from pocketsize.models.model import SPARSITY, Model
from pocketsize.pruning.mask import lacking
from pocketsize.pruning.pattern import pattern_of

_WAY_OUT = f"remove the key {SPARSITY} if the model is not pruned, or restore the folder"


def check_said(raw: Mapping[str, object], path: Path) -> None:
    """Refuse a config whose `sparsity` is none of ours; `path` is for errors."""
    said = raw.get(SPARSITY)
    if said is None:
        return
    if not isinstance(said, dict):
        raise _odd(path, SPARSITY, said, "structure and share of the linears' zeros are needed")
    structure, share = said.get("structure"), said.get("share")
    if not isinstance(structure, str):
        raise _odd(
            path, f"{SPARSITY}.structure", structure, "unstructured, or a pattern such as 2:4, is needed"
        )
    if not _is_share(share):
        raise _odd(path, f"{SPARSITY}.share", share, "a number above 0 and below 1 is needed")
    try:
        pattern = pattern_of(structure, float(str(share)))
    except UsageError as error:
        raise DataError(f"{path}: {SPARSITY}.structure is {structure[:80]!r}: {error}; {_WAY_OUT}") from error
    if pattern.of and not math.isclose(pattern.sparsity, float(str(share)), abs_tol=1e-6):
        raise _odd(path, f"{SPARSITY}.share", share, f"{structure} makes {pattern.sparsity:g} zero")
    if not isinstance(said.get("uneven", False), bool):
        raise _odd(path, f"{SPARSITY}.uneven", said["uneven"], "true or false is needed")
    if said.get("rank") is not None and not _is_share(said["rank"]):
        raise _odd(path, f"{SPARSITY}.rank", said["rank"], "a number above 0 and below 1 is needed")


def require_zeros(model: Model, name: str, W: Tensor) -> None:
    """Refuse a linear of a pruned model, as it is stored, with other zeros than the config says.

    More are fine: a weight may become zero by itself. Where linears differ (`uneven`) nothing is known
    of each, see `require_some_zeros`.
    """
    pattern = model.pattern
    if pattern is None or pattern.uneven or (wrong := _lacking(model, name, W)) is None:
        return
    file = model.checkpoint.folder / model.checkpoint.entries[name].file
    raise DataError(
        f"{file}: tensor {name}: {wrong}, and {model.folder / 'config.json'} says {SPARSITY}: "
        f"{pattern.name}, {pattern.sparsity:g} of each linear; correct or remove the key, restore the "
        f"folder, or set {SPARSITY}.uneven to true where linears were left out on purpose"
    )


def require_some_zeros(model: Model) -> None:
    """Refuse a pruned model whose linears differ, where none has the share that the config tells of.

    The share is the mean of all, or the largest: one linear at least has as much. The first ends the search.
    """
    pattern = model.pattern
    if pattern is None or not pattern.uneven:
        return
    if all(_lacking(model, name, model.checkpoint.read(name)) for name in model.linears):
        raise DataError(
            f"{model.folder / 'config.json'}: {SPARSITY}: {pattern.name}, {pattern.sparsity:g}: none of the "
            f"{len(model.linears)} linears has as many zeros, such as {model.linears[0]}; {_WAY_OUT}"
        )


def _lacking(model: Model, name: str, W: Tensor) -> str | None:
    assert model.pattern is not None
    return lacking(W.T if model.arch.is_transposed(name) else W, model.pattern)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1


def _odd(path: Path, key: str, value: object, needed: str) -> DataError:
    shown = repr(value)
    return DataError(f"{path}: {key} is {shown[:80]}; {needed}; {_WAY_OUT}")
