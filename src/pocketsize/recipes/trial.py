"""How long a training will take: a second of it is made and timed, and nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pocketsize.io.publish import scratch
from pocketsize.measurement.machine import cpu_seconds
from pocketsize.models.model import Model
from pocketsize.recipes.duration import Took
from pocketsize.recipes.journal import Journal, open_journal
from pocketsize.recipes.record import Finding
from pocketsize.recipes.step import Context
from pocketsize.recipes.texts import Texts
from pocketsize.recipes.training import Training
from pocketsize.training.loop import Keeper

# Steps after the first, which also warms up, are made until they have taken so many seconds: one that lasts
# a few milliseconds says little by itself.
ENOUGH_S = 1.0


class _Enough(Exception):
    """The steps that were to be made are made."""


@dataclass(slots=True)
class _Trial(Journal):
    """A journal whose trainings end after a few steps, and which keeps of them only the time they took."""

    at: list[tuple[float, float]] = field(default_factory=list)

    def beside(self, name: str) -> _Trial:
        """The journal of a stage, whose training ends as early."""
        folder = self.folder / name
        return _Trial(folder, open_journal(folder, self.fingerprint).fingerprint, at=self.at)

    def course(self, key: str) -> Keeper:
        """A keeper that lets no training go on."""
        return _Timed(self.at)

    def made(self, key: str, write: Callable[[Path], None], findings: list[Finding]) -> Path:
        """Never comes to an end, unless the training is as short as the trial."""
        with scratch("trial") as folder:
            write(folder)
        raise _Enough


@dataclass(frozen=True, slots=True)
class _Timed:
    at: list[tuple[float, float]]

    @property
    def stopping(self) -> bool:
        """Takes the time at the end of a step; when enough is known the training ends."""
        self.at.append((time.perf_counter(), cpu_seconds()))
        if len(self.at) > 1 and self.at[-1][0] - self.at[0][0] >= ENOUGH_S:
            raise _Enough
        return False

    def last(self) -> None:
        """There is no checkpoint."""

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Nothing is kept."""

    def safe_point(self, where: str) -> None:
        """Nobody stops a trial."""


def training_time(
    step: Training, student: Model, teacher: Model, texts: Texts, *, seed: int
) -> tuple[Took, int]:
    """The time of a training, from some of its steps, and how many of them were made.

    `teacher` is who teaches where the step names nobody.

    A budget in minutes is taken at its word. What comes before the first step (reading the text, loading the
    teacher) is counted once.
    """
    steps: list[int] = []
    plain, times = step.rehearsal()
    start, cpu = time.perf_counter(), cpu_seconds()
    with scratch("plan") as work:
        trial = _Trial(work, open_journal(work, {}).fingerprint)
        ctx = Context(
            texts.calibrate.input_ids,
            texts.calibrate.mask,
            trial,
            lambda done, total, what: steps.append(total),
            original=teacher,
            corpus=texts.train,
            seed=seed,
        )
        with suppress(_Enough):
            plain.apply(student, ctx)
    (first, first_cpu), (last, last_cpu) = trial.at[0], trial.at[-1]
    if step.minutes is not None:
        share = (last_cpu - first_cpu) / max(1e-9, last - first)
        return Took(step.kind, 60 * step.minutes * share, 60 * step.minutes), len(trial.at)
    more = max(0, steps[-1] - 1)
    timed = max(1, len(trial.at) - 1)
    took = Took(
        step.kind,
        times * (first_cpu - cpu + more * (last_cpu - first_cpu) / timed),
        times * (first - start + more * (last - first) / timed),
    )
    return took, len(trial.at)
