"""Whether a run has room: memory for its largest stage, disk for what it writes; refused before it starts."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from pocketsize.errors import ResourceError
from pocketsize.measurement.machine import rss_bytes
from pocketsize.measurement.memory import available_bytes
from pocketsize.models.batches import full_windows, mean_width
from pocketsize.models.model import Model
from pocketsize.models.waiting import waiting_bytes
from pocketsize.recipes.disk import Written, written_bytes
from pocketsize.recipes.memory import Size, Stage, fewer_windows, needed_bytes, stages
from pocketsize.recipes.recipe import Recipe
from pocketsize.recipes.texts import Texts


@dataclass(frozen=True, slots=True)
class Room:
    """What a run takes and what is there.

    `available_ram_bytes` counts what this process holds already, as the run takes its place; None where
    nobody says. `way_out` says what would fit; it is empty where everything does.
    """

    base_bytes: int
    stages: tuple[Stage, ...]
    needed_ram_bytes: int
    available_ram_bytes: int | None
    disk: Written
    free_disk_bytes: int
    disk_folder: Path
    way_out: str = ""

    @property
    def fits(self) -> bool:
        """Whether there is room for all of it."""
        return not self.way_out


def room_of(model: Model, recipe: Recipe, texts: Texts, out: Path) -> Room:
    """The room that a resolved recipe needs, and has, on this machine."""
    size, base = size_of(recipe, texts), rss_bytes()
    calibrated = any(step.calibrated for step in recipe.steps)
    waiting = waiting_bytes(model, mean_width(texts.calibrate.mask)) if calibrated else 0.0

    def needed(windows: int) -> list[Stage]:
        return stages(model, recipe, size.with_windows(windows), base_bytes=base, waiting=waiting)

    found, left = needed(size.windows), available_bytes()
    disk = written_bytes(model, recipe, written_tokens=size.written * size.length)
    free, folder = free_bytes(out)
    there = None if left is None else left + base
    room = Room(base, tuple(found), needed_bytes(found), there, disk, free, folder)
    if room.available_ram_bytes is not None and room.needed_ram_bytes > room.available_ram_bytes:
        most = room.available_ram_bytes
        fewer = fewer_windows(lambda n: needed_bytes(needed(n)), size.windows, most) if calibrated else 0
        return replace(room, way_out=_less(room, size, fewer, needed_bytes(needed(1))))
    if disk.peak_bytes > free:
        said = f"the run writes {_gb(disk.peak_bytes)}, {_gb(free)} are free in {folder}"
        return replace(room, way_out=f"{said}; free some space, or write elsewhere with -o")
    return room


def require_room(model: Model, recipe: Recipe, texts: Texts, out: Path, work: Path) -> None:
    """Refuse a run for which there is no room, saying what would fit.

    What an unfinished run of it has written to the folder `work` need not be written again.
    """
    room = room_of(model, recipe, texts, out)
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    enough = room.disk.peak_bytes - there <= room.free_disk_bytes
    short_of_memory = (room.available_ram_bytes or room.needed_ram_bytes) < room.needed_ram_bytes
    if short_of_memory or not enough:
        raise ResourceError(f"{recipe.model}: {room.way_out}")


def size_of(recipe: Recipe, texts: Texts) -> Size:
    """How much text calibrates; the files may hold less than the recipe asks for."""
    mask, own = texts.calibrate.mask, recipe.data.written_windows
    return Size(
        full_windows(mask) + own, recipe.windows_written, mask.shape[1], texts.evaluate.input_ids.numel()
    )


def free_bytes(out: Path) -> tuple[int, Path]:
    """What is free where `out` is, or would be made; and the folder that was asked."""
    there = home_of(out)
    return shutil.disk_usage(there).free, there


def home_of(out: Path) -> Path:
    """The folder where `out` is, or the nearest one it would be made in; refused where it takes no files."""
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not there.is_dir():
        raise ResourceError(f"{there}: is a file, so no output can be made there; choose another with -o")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ResourceError(f"{there}: may not be written to; choose another output with -o")
    return there


def _less(room: Room, size: Size, windows: int, least: int) -> str:
    """Which stage is too large, and what to change so that it fits."""
    worst = max(room.stages, key=lambda stage: stage.together_bytes)
    said = (
        f"stage {worst.name} needs {_gb(worst.together_bytes)} of memory, "
        f"{_gb(room.available_ram_bytes or 0)} are available"
    )
    if windows:
        return f"{said}; {windows} calibration windows of {size.length} tokens fit: use --sequences {windows}"
    alone = f", with a single calibration window {_gb(least)}" if least < room.needed_ram_bytes else ""
    return f"{said}{alone}; close other programs, or use a machine with more memory"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
