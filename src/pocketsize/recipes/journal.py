"""The work folder of a run: a lock, a journal, and one object per finished unit.

A unit counts once its journal line is durable; its object was durable before that. Objects are
named after their content. Nothing in a work folder is ever changed in place.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pocketsize.errors import BusyError, IntegrityError, ResourceError
from pocketsize.io.checkpoint import TensorSpec, open_file, write_safetensors
from pocketsize.io.publish import fsync, publish_bytes, sha256_of
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.scheme import Scheme
from pocketsize.recipes.record import LayerReport

PARTS = ("codes", "scale", "zero")


@dataclass(slots=True)
class Journal:
    """The open work folder of one run; holds its lock until closed."""

    folder: Path
    lock: int
    units: dict[str, tuple[LayerReport, ...]] = field(default_factory=dict)
    kept: StoredWeights = field(default_factory=lambda: StoredWeights({}))
    resumed: int = 0

    def keep(self, key: str, weights: Mapping[str, QWeight], reports: tuple[LayerReport, ...]) -> None:
        """Make the finished unit `key` durable: its object first, then its journal line."""
        temporary = self.folder / "objects" / f".{os.getpid()}.partial"
        schemes = {name: asdict(q.scheme) for name, q in weights.items()}
        sha = write_safetensors(temporary, _specs(weights), {"schemes": json.dumps(schemes, sort_keys=True)})
        path = self.folder / "objects" / f"{sha}.safetensors"
        os.replace(temporary, path)
        fsync(path.parent)
        line = {"unit": key, "object": sha, "schemes": schemes, "reports": [asdict(r) for r in reports]}
        _append(self.folder / "journal", line)
        self.add(line)

    def finished(self, key: str) -> tuple[LayerReport, ...] | None:
        """The reports of a durable unit, else None."""
        return self.units.get(key)

    def weights(self) -> Mapping[str, QWeight]:
        """All weights kept so far, read from disk when asked for."""
        return self.kept

    def close(self, *, remove: bool) -> None:
        """Give the lock back; with `remove` the work folder goes too."""
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self.lock)

    def add(self, line: dict[str, Any]) -> None:
        """Take up a journal line that is durable."""
        path = self.folder / "objects" / f"{line['object']}.safetensors"
        self.units[line["unit"]] = tuple(LayerReport(**r) for r in line["reports"])
        for name, scheme in line["schemes"].items():
            self.kept.where[name] = (path, Scheme(**scheme))


@dataclass(frozen=True, slots=True)
class StoredWeights(Mapping[str, QWeight]):
    """Quantized weights that stay on disk until one is asked for."""

    where: dict[str, tuple[Path, Scheme]]

    def __getitem__(self, name: str) -> QWeight:
        path, scheme = self.where[name]
        stored = open_file(path)
        codes, scale, zero = (stored.read(f"{name}.{part}") for part in PARTS)
        return QWeight(codes, scale, zero, scheme)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def open_journal(folder: Path, fingerprint: Mapping[str, str]) -> Journal:
    """The work folder of the run with this fingerprint, new or unfinished.

    Another process at work: BusyError. An unfinished run of something else: IntegrityError that
    names what differs. Objects that are damaged, or that no journal line names, are dropped, and
    their units done again.
    """
    try:
        (folder / "objects").mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ResourceError(f"{folder}: cannot create the work folder: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 64, 0).decode(errors="replace").strip()
        os.close(lock)
        raise BusyError(f"{folder}: process {holder or 'unknown'} is working on this output") from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    journal = Journal(folder, lock)
    try:
        _replay(journal, dict(fingerprint))
    except BaseException:
        os.close(lock)
        raise
    return journal


def _replay(journal: Journal, fingerprint: dict[str, str]) -> None:
    path = journal.folder / "journal"
    lines = _complete_lines(path)
    if not lines:
        path.unlink(missing_ok=True)
        _append(path, {"fingerprint": fingerprint})
        return
    _same(journal.folder, lines[0]["fingerprint"], fingerprint)
    sound: list[dict[str, Any]] = []
    for line in lines[1:]:
        held = journal.folder / "objects" / f"{line['object']}.safetensors"
        if held.is_file() and sha256_of(held) == line["object"]:
            sound.append(line)
        else:
            break  # later units were calibrated on this one: they are done again with it
    named = {f"{line['object']}.safetensors" for line in sound}
    for held in (journal.folder / "objects").iterdir():
        if held.name not in named:
            held.unlink()
    if len(sound) != len(lines) - 1 or not path.read_bytes().endswith(b"\n"):
        publish_bytes(path, b"".join(_encoded(line) for line in [lines[0], *sound]))
    for line in sound:
        journal.add(line)
    journal.resumed = len(sound)


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The journal's lines up to the first that is cut short."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_bytes().split(b"\n")[:-1]:
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


def _same(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise IntegrityError(
                f"{folder}: holds an unfinished run of something else: {key} was {before.get(key)!r} and "
                f"is now {now.get(key)!r}; run it as before to finish it, or delete this folder to start anew"
            )


def _specs(weights: Mapping[str, QWeight]) -> list[TensorSpec]:
    specs: list[TensorSpec] = []
    for name, q in weights.items():
        for part in PARTS:
            tensor: torch.Tensor = getattr(q, part)
            specs.append(
                TensorSpec(
                    f"{name}.{part}", tensor.dtype, tuple(tensor.shape), lambda t=tensor: t.contiguous()
                )
            )
    return specs


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """One durable journal line."""
    new = not path.exists()
    try:
        with path.open("ab") as file:
            file.write(_encoded(line))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror}") from error
    if new:
        fsync(path.parent)


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, sort_keys=True).encode() + b"\n"
