"""The folder that a run makes: what may stand there before, and what a killed run left beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pocketsize.errors import DataError, UsageError, what_differs
from pocketsize.exporting.manifest import NAME as MANIFEST
from pocketsize.exporting.manifest import added_files, check_manifest
from pocketsize.io.publish import clear_leftovers, remove
from pocketsize.io.source import resolve
from pocketsize.recipes.journal import JOURNAL, LOCK, fingerprint_in
from pocketsize.recipes.recipe import Recipe
from pocketsize.recipes.record import RunRecord, read_record

RECORD = "record.json"


def work_folder(out: Path) -> Path:
    """Where unfinished work for `out` is kept."""
    return out.resolve().parent / f".{out.resolve().name}.work"


def check_output(out: Path, recipe: Recipe, *, overwrite: bool) -> None:
    """Refuse an output that holds something already, but a finished one.

    What a killed process left beside it is cleared away, before any work needs the room.
    """
    if (source := Path(recipe.source)).is_dir() and out.resolve().parent.is_relative_to(source.resolve()):
        raise UsageError(f"{out}: lies in the model's own folder; choose another output with -o")
    clear_leftovers(out)
    if not _is_taken(out):
        return
    record = _record_of(out)
    if record is None:
        refuse_taken(out, overwrite=overwrite)
    require_finished(out)
    given = resolve(recipe.source), Path(recipe.source)  # a GGUF file, and the folder it has become
    if any(source.resolve().is_relative_to(out.resolve()) for source in given):
        raise UsageError(f"{out}: holds the model itself; choose another output with -o")
    work = work_folder(out)
    begun = [fingerprint_in(path.parent) for path in work.rglob(JOURNAL)]
    if record is not None and record.fingerprint in begun:
        # That run was killed when its output was in its place already.
        remove(*(path for path in work.iterdir() if path.name != LOCK))


def refuse_taken(out: Path, *, overwrite: bool, now: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuse an output that holds something already, unless it may be replaced.

    Of a finished one the error tells what else its run was of than `now`.
    """
    if not _is_taken(out) or overwrite:
        return
    record = _record_of(out) if now else None
    before = {} if record is None else record.fingerprint
    if before and (differ := what_differs(before, now)):
        raise UsageError(
            f"{out}: holds the output of another run: {differ[0]}; choose another output with -o, or replace "
            "it with --overwrite"
        )
    raise UsageError(
        f"{out}: exists and is not an empty folder; choose another output with -o, or replace a finished "
        "one with --overwrite"
    )


def require_finished(out: Path) -> None:
    """Refuse to replace what is not an output of ours, or holds anything that no run wrote."""
    if out.is_symlink() or not (out / MANIFEST).is_file() or not (out / RECORD).is_file():
        raise UsageError(f"{out}: is not a finished output (no {MANIFEST} and {RECORD}); it is left alone")
    if added := added_files(out):
        raise UsageError(
            f"{out}: holds {added[0]}, which no run wrote; move it away, or choose another output"
        )


def made_by(out: Path, fingerprint: Mapping[str, str]) -> RunRecord | None:
    """The record of the output, if that is whole and of the run with this fingerprint; else None."""
    record = _record_of(out)
    return None if record is None or record.fingerprint != fingerprint or check_manifest(out) else record


def _is_taken(out: Path) -> bool:
    return out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir())))


def _record_of(out: Path) -> RunRecord | None:
    """The record of a finished output; None where there is none that this version can read."""
    try:
        return read_record(out / RECORD) if (out / MANIFEST).is_file() else None
    except DataError:
        return None
