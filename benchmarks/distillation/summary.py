"""Runs of labelled sets as rows and bars: kept shares with intervals, and what a teacher adds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import numpy as np
from bars import Bar
from kept import Runs, kept_of, score
from tasks import TASKS

NAMES = {
    "teacher": "teacher",
    "half-taught": "half the blocks, taught",
    "half-control": "half the blocks, labels alone",
    "small-taught": "a sixth of the blocks, taught",
    "small-control": "a sixth of the blocks, labels alone",
    "small-wider": "a sixth of the blocks, taught, unlabelled texts too",
    "small-longer": "a sixth of the blocks, labels alone, as many steps",
}
# As long as the longest training, and no part of the claims: a row may go without.
LONGEST = "small-longer"
MODELS = {"quick": "minilm-l6", "full": "mpnet-base"}


def rows_of(row: str, tasks: Mapping[str, Runs]) -> list[dict[str, object]]:
    """A row for each model: its score in each task, the average, what is kept, its size and speed."""
    found: list[dict[str, object]] = []
    for name, said in NAMES.items():
        if any(name not in task for task in tasks.values()):
            continue
        runs = [task[name] for task in tasks.values()]
        one: dict[str, object] = {"weights": MODELS[row], "method": said}
        one |= {task: round(score(runs[name]), 4) for task, runs in tasks.items()}
        one["average"] = round(_mean(tasks, name), 4)
        kept, low, high = kept_of(tasks, name)
        one["kept"] = {"median": round(kept, 4), "min": round(low, 4), "max": round(high, 4)}
        one["parameters_m"] = round(runs[0]["parameters"] / 1e6, 2)
        one["mb_bf16"] = round(runs[0]["bytes"] / 1e6, 2)
        one["compute_share"] = round(_compute(tasks, name), 4)
        one["times_faster"] = 1.0 if name == "teacher" else round(_faster(tasks, name), 3)
        found.append(one)
    return found


def bars(row: str, tasks: Mapping[str, Runs]) -> list[Bar]:
    """The claims of a row."""
    said = f"{MODELS[row]}, {len(tasks)} of {len(TASKS)} tasks"
    saved = 1 - _parameters(tasks, "half-taught") / _parameters(tasks, "teacher")
    found = [
        Bar(f"{said}: half the blocks, score kept", kept_of(tasks, "half-taught")[0], "", "higher", 0.97),
        Bar(f"{said}: half the blocks, parameters saved", saved, "", "higher", 0.39),
        Bar(f"{said}: half the blocks, times faster", _faster(tasks, "half-taught"), "x", "higher", 1.6),
        Bar(
            f"{said}: half the blocks, score won by a teacher",
            _gain(tasks, "half-taught", "half-control"),
            "",
            "higher",
            0.001,
        ),
        Bar(
            f"{said}: at a fifth of the compute, score kept",
            kept_of(tasks, "small-taught")[0],
            "",
            "higher",
            0.95,
        ),
        Bar(
            f"{said}: at a fifth of the compute, score won by a teacher",
            _gain(tasks, "small-taught", "small-control"),
            "",
            "higher",
            0.001,
        ),
        Bar(
            f"{said}: at a fifth of the compute, unlabelled texts too, score kept",
            kept_of(tasks, "small-wider")[0],
            "",
            "higher",
            0.95,
        ),
    ]
    if all(LONGEST in task for task in tasks.values()):
        what = f"{said}: at a fifth of the compute, unlabelled texts too, score won by a teacher"
        found.append(Bar(what, _gain(tasks, "small-wider", LONGEST), "", "higher", 0.001))
    return found


def _mean(tasks: Mapping[str, Runs], name: str) -> float:
    return float(np.mean([score(runs[name]) for runs in tasks.values()]))


def _gain(tasks: Mapping[str, Runs], taught: str, control: str) -> float:
    return _mean(tasks, taught) - _mean(tasks, control)


def _parameters(tasks: Mapping[str, Runs], name: str) -> float:
    return statistics.mean(runs[name]["parameters"] for runs in tasks.values())


def _compute(tasks: Mapping[str, Runs], name: str) -> float:
    """The share of the teacher's multiplications: an embedding multiplies nothing."""
    runs = next(iter(tasks.values()))
    return runs[name]["block_parameters"] / runs["teacher"]["block_parameters"]


def _faster(tasks: Mapping[str, Runs], name: str) -> float:
    """The median over tasks of how much sooner it answers than its teacher."""
    ratios = [
        statistics.median(runs[name]["teacher_ms"]) / statistics.median(runs[name]["ms"])
        for runs in tasks.values()
    ]
    return statistics.median(ratios)
