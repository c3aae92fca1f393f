"""What a teacher said of each position, computed once and kept on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pocketsize.distillation.signal import Signal, sampled, top_k
from pocketsize.errors import DataError, IntegrityError, what_differs
from pocketsize.io.checkpoint import TensorSpec, write_safetensors
from pocketsize.io.lock import lock_file
from pocketsize.io.mapped import mapped
from pocketsize.io.publish import make_folder, move, publish_bytes, remove, sha256_of
from pocketsize.training.examples import Batch, Examples

PRECISION = "precision"
KINDS = ("top_k", "sampled")
# What pins a folder of signals, beside its parts.
FACTS, PARTS, LOCK = "signals.json", "parts", "lock"
# Tokens of a part: what is lost of the work when it is cut off.
PART = 8192
# The logits of so many positions are drawn from at a time.
ROWS = 256

# The logits of the teachers at the predicted positions of a batch, those of a slice at a time.
Says = Callable[[Batch, Bool[Tensor, "n s"]], Callable[[slice], Float[Tensor, "t vocab"]]]


@dataclass
class Signals:
    """A folder of signals: for each row of some examples what was said at each of its predicted positions.

    `kept` tokens at each position, the likeliest (`top_k`, with what is left for all others) or as many
    draws (`sampled`, by `seed` and row): a number of 2 or 4 bytes and a log-probability of 2 for each. Rows
    come in any order and at any time, in parts that are named after their content; what is damaged does not
    count.
    """

    folder: Path
    kind: str
    kept: int
    vocabulary: int
    seed: int
    where: dict[int, tuple[Mapping[str, np.ndarray], int, int]] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Which of the rows nothing is kept of."""
        return [row for row in rows if row not in self.where]

    def hear(
        self, rows: Sequence[int], examples: Examples, says: Says, told: Callable[[int, int], None]
    ) -> None:
        """Let the teachers speak of those of these rows of the examples that are missing, part by part."""
        lock = lock_file(self.folder / LOCK)
        try:
            for path in self.look():
                remove(path)
            rows, done = self.missing(rows), 0
            for part in _parts(rows, examples):
                self._keep(part, [self._of_row(row, examples.batch([row]), says) for row in part])
                told(done := done + len(part), len(rows))
        finally:
            os.close(lock)

    def look(self) -> list[Path]:
        """Take up all sound parts that lie there; the others."""
        damaged: list[Path] = []
        for path in sorted((self.folder / PARTS).glob("*")):
            if path.stem in self.parts:
                continue
            if sha256_of(path) != path.stem:
                damaged.append(path)
                continue
            self.parts.add(path.stem)
            self._take_up(path)
        return damaged

    def __call__(self, batch: Batch, kept: Bool[Tensor, "n s"]) -> Signal:
        """What was said of a batch at the positions `kept`."""
        found = [self._row(row) for row in batch.rows]
        if sum(len(part.ids) for part in found) != int(kept.sum()):
            raise DataError(f"{self.folder}: these rows have other predicted positions than those kept here")
        device = kept.device
        ids, weight, log_p = (
            torch.cat([getattr(part, name) for part in found]).to(device)
            for name in ("ids", "weight", "log_p")
        )
        tails = [part.tail for part in found if part.tail is not None]
        return Signal(ids, weight, log_p, torch.cat(tails).to(device) if tails else None)

    def _of_row(self, row: int, batch: Batch, says: Says) -> Signal:
        kept = batch.mask.clone()
        kept[:, -1] = False
        logits, count = says(batch, kept), int(kept.sum())
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + row)
        found: list[Signal] = []
        for a in range(0, count, ROWS):
            own = logits(slice(a, min(a + ROWS, count))).cpu()
            found.append(top_k(own, self.kept) if self.kind == "top_k" else sampled(own, self.kept, draw))
        tails = [one.tail for one in found if one.tail is not None]
        ids, weight, log_p = (
            torch.cat([getattr(one, name) for one in found]) for name in ("ids", "weight", "log_p")
        )
        return Signal(ids, weight, log_p, torch.cat(tails) if tails else None)

    def _keep(self, rows: Sequence[int], heard: Sequence[Signal]) -> None:
        starts = torch.tensor([0, *np.cumsum([len(one.ids) for one in heard]).tolist()])
        tensors = {
            "rows": torch.tensor(list(rows)),
            "starts": starts,
            "ids": torch.cat([one.ids for one in heard]).to(self._numbers),
            "log_p": torch.cat([one.log_p for one in heard]).to(torch.float16),
        }
        if tails := [one.tail for one in heard if one.tail is not None]:
            tensors["tail"] = torch.cat(tails)
        place = self.folder / PARTS
        make_folder(place)
        specs = [TensorSpec(n, T.dtype, tuple(T.shape), lambda T=T: T) for n, T in tensors.items()]
        sha = write_safetensors(place / "unnamed", specs, {})
        move(place / "unnamed", place / f"{sha}.safetensors")
        self.parts.add(sha)
        self._take_up(place / f"{sha}.safetensors")

    def _take_up(self, path: Path) -> None:
        part = mapped(path)
        bounds = part["starts"].tolist()
        for row, a, b in zip(part["rows"].tolist(), bounds[:-1], bounds[1:], strict=True):
            self.where[row] = part, a, b

    @property
    def _numbers(self) -> torch.dtype:
        """What token numbers are kept as; those above 32767 are below 0 in two bytes."""
        return torch.int16 if self.vocabulary <= 2**16 else torch.int32

    def _row(self, row: int) -> Signal:
        part, a, b = self.where[row]
        ids = torch.from_numpy(part["ids"][a:b].astype(np.int64))
        ids = ids & 0xFFFF if self._numbers == torch.int16 else ids
        log_p = torch.from_numpy(part["log_p"][a:b].astype(np.float32))
        if self.kind == "sampled":
            return Signal(ids, torch.full_like(log_p, 1 / self.kept), log_p)
        tail = torch.from_numpy(np.array(part["tail"][a:b]))
        # Rounded log-probabilities add up to nearly what they should; the rest is the tail's, as it was.
        log_p = log_p + (torch.log1p(-tail.clamp(max=1 - 1e-7)) - log_p.logsumexp(-1))[:, None]
        return Signal(ids, log_p.exp(), log_p, tail)


def open_signals(folder: Path, facts: Mapping[str, str], vocabulary: int) -> Signals:
    """The signals of these facts, as far as they are in the folder, which is made if it is not there.

    Facts are `signals`, `kept` and `seed`, and all that decides what teachers say. A folder of other facts
    is an IntegrityError that names the first that differs. Damaged parts do not count, and go before others
    are made.
    """
    require_signals(folder, facts)
    if not (folder / FACTS).is_file():
        make_folder(folder)
        publish_bytes(folder / FACTS, json.dumps(dict(facts), indent=1).encode())
    found = Signals(folder, facts["signals"], int(facts["kept"]), vocabulary, int(facts["seed"]))
    found.look()
    return found


def require_signals(folder: Path, facts: Mapping[str, str]) -> None:
    """Refuse a folder that holds signals of other facts, or other things; one to come may be absent."""
    path = folder / FACTS
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise IntegrityError(
                f"{folder}: holds other things, and no {FACTS}; name a new folder for signals"
            )
        return
    before = _read(path)
    if PRECISION in facts:
        before = {PRECISION: "fp32"} | before  # folders of old do not say it
    if differ := what_differs(before, facts):
        way = "name another folder, or delete this one"
        if differ[0].startswith(PRECISION):
            way = f"use {PRECISION}: {before[PRECISION]}, or name another folder"
        raise IntegrityError(f"{folder}: holds what teachers said of something else: {differ[0]}; {way}")


def _read(path: Path) -> dict[str, str]:
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(f"{path}: not readable: {error}; delete the folder to begin anew") from error
    if not isinstance(raw, dict):
        raise IntegrityError(f"{path}: no facts of signals; delete the folder to begin anew")
    return {str(key): str(value) for key, value in raw.items()}


def _parts(rows: Sequence[int], examples: Examples) -> Iterator[list[int]]:
    """The rows in parts of about `PART` tokens."""
    own, tokens = list[int](), 0
    for row in rows:
        own.append(row)
        tokens += int(examples.lengths[row])
        if tokens >= PART:
            yield own
            own, tokens = [], 0
    if own:
        yield own
