"""How the benchmarks' labelled sets are split."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROWS = [(f"text {i} of {label}", label) for label in "abc" for i in range(60 if label == "c" else 100)]


@pytest.fixture(scope="module")
def tasks() -> Iterator[ModuleType]:
    """The module, imported as benchmarks do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        yield importlib.import_module("tasks")


def test_what_evaluates_never_trains_and_is_the_same_however_many_train(tasks: ModuleType) -> None:
    plain, wide = (
        [tasks.split(ROWS, (10, 8), times, more) for times in range(1, tasks.MOST + 1)] for more in (0, 50)
    )
    for few, many in zip(plain, wide, strict=True):
        assert few[0] == many[0]
        assert not {*many[0]} & {*many[1]}
        assert {*few[1]} < {*many[1]} and few[1] == plain[0][1] and many[1] == wide[0][1]
    assert [len(train) for train, _ in plain] == [30, 60, 90] and len(plain[0][1]) == 24
    # A class that has fewer left than were asked for gives what it has.
    assert {label: sum(own == label for _, own in wide[0][1]) for label in "abc"} == {
        "a": 58,
        "b": 58,
        "c": 30,
    }


def test_texts_without_labels_are_neither_those_that_train_nor_those_that_evaluate(tasks: ModuleType) -> None:
    used = tasks.split(ROWS, (10, 8), tasks.MOST, 50)
    left = tasks.others(ROWS, *used)
    assert left and not {*left} & {text for some in used for text, _ in some}
    assert {*left} | {text for some in used for text, _ in some} == {text for text, _ in ROWS}
    assert left == tasks.others(ROWS[::-1], *used)
