"""The same steps in Pocketsize's loop."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from meter import peak_rss_bytes, write_json
from torch import Tensor

from pocketsize.models.dtype import NAMES
from pocketsize.models.load import load
from pocketsize.models.products import quick_products
from pocketsize.models.skeleton import materialise
from pocketsize.training.examples import of_rows
from pocketsize.training.loop import Pace, train
from pocketsize.training.objective import Losses, NextToken, Teacher


class Clock:
    """CPU seconds at the end of each step; nothing is kept."""

    def __init__(self) -> None:
        self.at = [time.process_time()]

    def last(self) -> None:
        """There is no checkpoint."""

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Nothing is kept."""

    @property
    def stopping(self) -> bool:
        """A step is over."""
        self.at.append(time.process_time())
        return False

    def safe_point(self, where: str) -> None:
        """Nobody stops."""


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("student", "teacher", "tokens", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    ids = np.load(chosen.tokens)
    student = materialise(load(chosen.student)).requires_grad_(True)
    teacher = Teacher(materialise(load(chosen.teacher)))
    objective = NextToken(student, Losses(), [teacher], dtype=NAMES[chosen.precision])
    examples, clock = of_rows(list(ids), 0, "tokens"), Clock()
    steps = len(ids) // chosen.batch
    pace = Pace(steps=steps, peak=1e-4, warmup=0.0, floor=0.0)
    with quick_products():
        course = train(
            student,
            objective,
            lambda n: examples.batch(range(n * chosen.batch, (n + 1) * chosen.batch)),
            pace,
            clock,
        )
    facts = {"cpu_s": np.diff(clock.at).tolist(), "losses": [loss for _, loss in course.losses]}
    write_json(chosen.out, facts | {"rss_peak": peak_rss_bytes()})


if __name__ == "__main__":
    main()
