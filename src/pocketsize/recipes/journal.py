"""The work folder of a run: a lock, a journal, and one object per finished unit.

A unit counts once its journal line is durable; its object was durable before that. Objects are
named after their content. Nothing in a work folder is ever changed in place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from pocketsize.errors import IntegrityError, what_differs
from pocketsize.io.checkpoint import Checkpoint, TensorSpec, open_file, write_safetensors
from pocketsize.io.lock import lock_file
from pocketsize.io.publish import (
    append,
    make_folder,
    move,
    publish_bytes,
    remove,
    remove_empty,
    sha256_of,
    staging,
)
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.scheme import Scheme
from pocketsize.recipes.record import Finding, LayerReport
from pocketsize.training.loop import Keeper

JOURNAL, LOCK = "journal", "lock"
# Finished models of steps that make one, and checkpoints of trainings.
MODELS, DRAFTS = "models", "drafts"
PARTS = ("codes", "scale", "zero")


@contextmanager
def working(folder: Path) -> Iterator[None]:
    """The work folder, held by this process alone; another one at work is a BusyError.

    It goes when the block ends without error, and when no journal was begun in it.
    """
    made = make_folder(folder)
    try:
        lock = lock_file(folder / LOCK)
    except BaseException:
        remove_empty(made)
        raise
    try:
        yield
        _clear(folder)
    except BaseException:
        if not any(folder.rglob(JOURNAL)):
            _clear(folder)
            remove_empty(made)
        raise
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    """Remove a work folder, its lock last: until then nobody else can begin in it."""
    remove(*(path for path in folder.iterdir() if path.name != LOCK), folder / LOCK)
    remove_empty([folder])


@dataclass(slots=True)
class Journal:
    """What a run has finished so far. `safe_point` is told whenever all of it is durable."""

    folder: Path
    fingerprint: dict[str, str]
    safe_point: Callable[[str], None] = lambda where: None
    stopping: Callable[[], bool] = lambda: False
    units: dict[str, tuple[LayerReport, ...]] = field(default_factory=dict)
    kept: StoredWeights = field(default_factory=lambda: StoredWeights({}))
    vectors: StoredTensors = field(default_factory=lambda: StoredTensors({}))
    told: dict[str, list[Finding]] = field(default_factory=dict)
    resumed: int = 0

    def keep(
        self,
        key: str,
        weights: Mapping[str, QWeight],
        reports: tuple[LayerReport, ...],
        changed: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """Make the finished unit `key` durable: its object first, then its journal line."""
        unnamed = self.folder / "objects" / "unnamed"
        schemes = {name: q.scheme.facts() for name, q in weights.items()}
        specs = [*_specs(weights), *(_spec(name, T) for name, T in sorted(changed.items()))]
        sha = write_safetensors(unnamed, specs, {"schemes": json.dumps(schemes, sort_keys=True)})
        move(unnamed, _object(self.folder, sha))
        line = {"unit": key, "object": sha, "schemes": schemes, "reports": [asdict(r) for r in reports]}
        line |= {"changed": sorted(changed)} if changed else {}
        append(self.folder / JOURNAL, _encoded(line))
        self.add(line)
        self.safe_point(f"after {key}")

    def finished(self, key: str) -> tuple[LayerReport, ...] | None:
        """The reports of a durable unit, else None."""
        self.safe_point(f"before {key}")
        return self.units.get(key)

    def weights(self) -> Mapping[str, QWeight]:
        """All weights kept so far, read from disk when asked for."""
        return self.kept

    def changed(self) -> Mapping[str, torch.Tensor]:
        """All changed tensors kept so far, read from disk when asked for."""
        return self.vectors

    def beside(self, name: str) -> Journal:
        """The journal of a stage, in a folder of its own within this one's."""
        own = open_journal(self.folder / name, self.fingerprint, self.safe_point, self.stopping)
        self.resumed += own.resumed
        return own

    def made(self, key: str, write: Callable[[Path], None], findings: list[Finding]) -> Path:
        """The folder with this name, which `write` filled, now or before the process was cut off.

        What it then added to `findings` is added either way.
        """
        place = self.folder / MODELS / key
        self.safe_point(f"before {key}")
        if key in self.units:
            findings += self.told.get(key, ())
            return place
        make_folder(place.parent)
        remove(place)
        before = len(findings)
        with staging(place) as there:
            write(there)
        told = [asdict(one) for one in findings[before:]]
        self._append({"unit": key, "folder": _hashes(place)} | ({"findings": told} if told else {}))
        remove(self.folder / DRAFTS / key)
        self.safe_point(f"after {key}")
        return place

    def course(self, key: str) -> Keeper:
        """Where the checkpoints of a training are kept; from now on this work is of this run."""
        return self.place(key)

    def place(self, key: str) -> Drafts:
        """A folder for work that checks by itself what of it is done; from now on it is of this run."""
        begun = f"{key} begun"
        if begun not in self.units:
            make_folder(self.folder / DRAFTS / key)
            self._append({"unit": begun, "folder": {}})
        return Drafts(self.folder / DRAFTS / key, self)

    def _append(self, line: dict[str, Any]) -> None:
        append(self.folder / JOURNAL, _encoded(line))
        self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Take up a journal line that is durable."""
        if "folder" in line:
            self.units[line["unit"]] = ()
            self.told[line["unit"]] = [Finding(**one) for one in line.get("findings", ())]
            return
        path = _object(self.folder, line["object"])
        self.units[line["unit"]] = tuple(LayerReport(**r) for r in line["reports"])
        for name, scheme in line["schemes"].items():
            self.kept.where[name] = (path, Scheme(**scheme))
        for name in line.get("changed", ()):
            self.vectors.where[name] = path


@dataclass(frozen=True, slots=True)
class Drafts:
    """The checkpoints of one training, named after their content; one that is damaged does not count."""

    folder: Path
    journal: Journal

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for."""
        return self.journal.stopping()

    def safe_point(self, where: str) -> None:
        """A stop that was asked for happens here."""
        self.journal.safe_point(where)

    def last(self) -> tuple[Mapping[str, torch.Tensor], Mapping[str, Any]] | None:
        """The newest whole checkpoint: its tensors and its facts; None where there is none."""
        found: list[tuple[int, Path]] = []
        for path in self.folder.glob("*.safetensors"):
            number, _, sha = path.stem.partition("-")
            if number.isdecimal() and sha256_of(path) == sha:
                found.append((int(number), path))
        if not found:
            return None
        path = max(found)[1]
        stored = open_file(path)
        facts = json.loads(path.with_suffix(".json").read_bytes())
        self.journal.resumed += 1
        return {name: stored.read(name) for name in stored.entries}, facts

    def save(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Make a checkpoint durable; the ones before it go once it is."""
        make_folder(self.folder)
        before = list(self.folder.iterdir())
        unnamed = self.folder / "unnamed"
        sha = write_safetensors(unnamed, [_spec(name, T) for name, T in tensors.items()], {})
        place = self.folder / f"{facts['step']}-{sha}.safetensors"
        publish_bytes(place.with_suffix(".json"), json.dumps(facts).encode())
        move(unnamed, place)
        remove(*(path for path in before if path.stem != place.stem))


@dataclass(frozen=True, slots=True)
class StoredWeights(Mapping[str, QWeight]):
    """Quantized weights that stay on disk until one is asked for."""

    where: dict[str, tuple[Path, Scheme]]
    opened: dict[Path, Checkpoint] = field(default_factory=dict)

    def __getitem__(self, name: str) -> QWeight:
        path, scheme = self.where[name]
        stored = self.stored(path)
        codes, scale, zero = (stored.read(f"{name}.{part}") for part in PARTS)
        return QWeight(codes, scale, zero, scheme)

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """The scheme of each weight; nothing is read for it."""
        return {name: scheme for name, (_, scheme) in self.where.items()}

    def stored(self, path: Path) -> Checkpoint:
        """What is in one of the files."""
        if path not in self.opened:
            self.opened[path] = open_file(path)
        return self.opened[path]

    def __contains__(self, name: object) -> bool:
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


@dataclass(frozen=True, slots=True)
class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors that stay on disk until one is asked for."""

    where: dict[str, Path]
    opened: dict[Path, Checkpoint] = field(default_factory=dict)

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self.where[name]
        if path not in self.opened:
            self.opened[path] = open_file(path)
        return self.opened[path].read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def open_journal(
    folder: Path,
    fingerprint: Mapping[str, str],
    safe_point: Callable[[str], None] = lambda where: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Journal:
    """The journal of the run with this fingerprint, new or unfinished; its folder is held (`working`).

    Finished units of something else: IntegrityError that names what differs. Objects that are
    damaged, or that no journal line names, are dropped, and their units done again.
    """
    make_folder(folder / "objects")
    path = folder / JOURNAL
    journal, (first, *lines) = Journal(folder, dict(fingerprint), safe_point, stopping), _lines(path)
    sound: list[dict[str, Any]] = []
    for line in lines:
        if not _is_sound(folder, line):
            break  # later units were calibrated on this one: they are done again with it
        sound.append(line)
    if sound:
        _require_same(folder, first["fingerprint"], fingerprint)
    named = {_object(folder, line["object"]) for line in sound if "object" in line}
    remove(*({*(folder / "objects").iterdir()} - named))
    units = {line["unit"] for line in sound}
    remove(*(path for path in (folder / MODELS).glob("*") if path.name not in units))
    remove(*(path for path in (folder / DRAFTS).glob("*") if f"{path.name} begun" not in units))
    text = b"".join(map(_encoded, [{"fingerprint": journal.fingerprint}, *sound]))
    if not path.is_file() or path.read_bytes() != text:
        publish_bytes(path, text)
    for line in sound:
        journal.add(line)
    journal.resumed = len(sound)
    return journal


def fingerprint_in(folder: Path) -> dict[str, str]:
    """Whose work a folder holds; empty where there is none."""
    return _lines(folder / JOURNAL)[0].get("fingerprint", {})


def _object(folder: Path, sha: str) -> Path:
    return folder / "objects" / f"{sha}.safetensors"


def _is_sound(folder: Path, line: Mapping[str, Any]) -> bool:
    """Whether what a journal line tells of lies there undamaged."""
    if "folder" in line:
        place = folder / MODELS / line["unit"]
        return not line["folder"] or (place.is_dir() and _hashes(place) == line["folder"])
    held = _object(folder, line["object"])
    return held.is_file() and sha256_of(held) == line["object"]


def _hashes(place: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder."""
    return {
        path.relative_to(place).as_posix(): sha256_of(path)
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    """The journal's lines up to the first that is cut short or damaged; the first has the fingerprint."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_bytes().split(b"\n")[:-1]:
            digest, _, body = text.partition(b" ")
            if digest != _digest(body):
                break
            lines.append(json.loads(body))
    return lines or [{}]


def _require_same(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse an unfinished run of something else: what is named first comes first in `now`."""
    if not (differ := what_differs(before, now)):
        return
    more = f" (and {len(differ) - 1} more differ)" if len(differ) > 1 else ""
    raise IntegrityError(
        f"{folder}: holds an unfinished run of something else: {differ[0]}{more}; run it as before to finish "
        "it, or delete this folder to start anew"
    )


def _specs(weights: Mapping[str, QWeight]) -> list[TensorSpec]:
    specs: list[TensorSpec] = []
    for name, q in weights.items():
        for part in PARTS:
            specs.append(_spec(f"{name}.{part}", getattr(q, part)))
    return specs


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, tensor.dtype, tuple(tensor.shape), lambda: tensor.contiguous())


def _encoded(line: Mapping[str, Any]) -> bytes:
    body = json.dumps(line, sort_keys=True).encode()
    return _digest(body) + b" " + body + b"\n"


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:16].encode()
