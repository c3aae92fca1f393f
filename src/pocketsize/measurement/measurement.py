"""One measured or estimated number, with everything needed to believe it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number with unit, direction, sample count, interval, method and origin.

    `low` and `high` bound a 95 % bootstrap interval and are None where none was computed
    (exact counts, single values). `method` says in one phrase how the number came about.
    `subject` says what was measured: `original`, `compressed`, or the name of an artefact.
    """

    name: str
    value: float
    unit: str
    better: Literal["lower", "higher"]
    method: str
    subject: str
    kind: Literal["measured", "estimated"] = "measured"
    samples: int | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"measurement {self.name!r} of {self.subject} is {self.value}")
