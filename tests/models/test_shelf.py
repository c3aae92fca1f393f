"""Memory for what waits: values survive the move, parts come back, nothing known is moved."""

from __future__ import annotations

import random
import sys

import pytest
import torch

from pocketsize.models.shelf import LESS, SPARE, Heap, Noted, Shelf, _resident

BIG = (64, 1024)


def address(X: torch.Tensor) -> int:
    return X.untyped_storage().data_ptr()


@pytest.mark.parametrize("seed", range(20))
def test_whatever_moves_keeps_its_values_and_parts_are_used_again(seed: int) -> None:
    chance, shelf, held = random.Random(seed), Shelf(4096), {}
    for i in range(30):
        X = torch.arange(chance.randint(1, 300), dtype=torch.float32) + i
        shelf.move([X])
        held[i] = X
        if chance.random() < 0.7:
            del held[chance.choice(sorted(held))]
        for first, Y in held.items():
            assert torch.equal(Y, torch.arange(len(Y), dtype=torch.float32) + first)
    held.clear()
    X = Y = None
    last = torch.ones(1024)
    before = address(last)
    shelf.move([last])
    assert address(last) != before, "all of the room was to be free again"


def test_room_that_cannot_be_had_says_how_much_it_was() -> None:
    with pytest.raises(MemoryError, match="can't allocate 72057594037927936 bytes"):
        Shelf(1 << 56)


def test_views_go_on_sharing_their_memory() -> None:
    whole = torch.randn(BIG)
    turned, before = whole.T, whole.clone()
    Shelf(1 << 20).move([whole, turned])
    assert torch.equal(whole, before) and torch.equal(turned, before.T)
    whole[3, 5] = 7.0
    assert turned[5, 3] == 7.0


def test_what_does_not_fit_or_is_part_of_something_larger_stays() -> None:
    large, part = torch.randn(BIG), torch.randn(BIG)[:8]
    where = address(large), address(part)
    shelf = Shelf(1024)
    shelf.move([large])
    Shelf(1 << 20).move([part])
    assert (address(large), address(part)) == where


def test_what_is_on_the_shelf_is_not_moved_again() -> None:
    shelf, X = Shelf(1 << 20), torch.randn(BIG)
    shelf.move([X])
    place = address(X)
    shelf.move([X, X.view(-1)])
    assert address(X) == place


def test_only_what_is_large_new_and_alive_is_noted() -> None:
    known = torch.randn(BIG)
    with torch.inference_mode():
        with (noted := Noted([known])):
            held = known * 2
            view, small = known.view(-1), known[:1] * 3
            pair = torch.split(known + 1, 32)
            (known + 2).sum()
        alive = noted.alive()
    assert {id(one) for one in alive} == {id(held), *map(id, pair)}
    assert noted.alive() == [] and view.numel() and small.numel()


def test_a_view_that_is_moved_away_frees_what_it_was_a_view_of() -> None:
    shelf = Shelf(1 << 20)
    with torch.inference_mode():
        with (noted := Noted([])):
            X = torch.randn(64, 16, 64).transpose(0, 1).contiguous().view(16, -1)
        old = torch.multiprocessing.reductions.StorageWeakRef(X.untyped_storage())
        shelf.move(noted.alive())
    assert old.expired()


def resident(monkeypatch: pytest.MonkeyPatch, *sizes: int) -> list[int]:
    """A process of these sizes, one look after the other; what its heap is told is appended to the list."""
    left, trimmed = iter(sizes), []
    monkeypatch.setattr("pocketsize.models.shelf._resident", lambda: next(left))
    monkeypatch.setattr(Heap, "_library", lambda self: trimmed.append)
    return trimmed


def test_gaps_are_given_back_once_the_process_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = resident(monkeypatch, 100, 100 + SPARE, 101 + SPARE, 50, 50 + SPARE, 51 + SPARE, 60)
    shelf = Shelf(1 << 20)
    shelf.tidy()
    assert trimmed == []
    shelf.tidy()
    assert trimmed == [0], "one byte over the limit"
    shelf.tidy()
    shelf.tidy()
    assert trimmed == [0, 0], "what it shrank to is what growth is counted from"


def test_gaps_are_given_back_before_the_process_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = resident(monkeypatch, 100, 110, 110, 90)
    shelf = Shelf(1 << 20)
    shelf.tidy(SPARE - 10)
    assert trimmed == []
    shelf.tidy(SPARE - 9)
    assert trimmed == [0], "what is needed next counts as growth"


def test_where_less_is_spare_gaps_are_given_back_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = resident(monkeypatch, 100, 101 + LESS, 101 + LESS)
    Shelf(1 << 20, LESS).tidy()
    assert trimmed == [0] and LESS < SPARE


@pytest.mark.skipif(sys.platform != "linux", reason="gaps are given back on Linux alone")
def test_gaps_are_no_memory_once_they_are_given_back_and_can_be_used_again() -> None:
    megabytes = 64
    shelf, kept = Shelf(megabytes << 20), torch.randn(BIG)
    before, gone = kept.clone(), torch.ones((megabytes - 1) << 18)
    shelf.move([kept])
    shelf.move([gone])
    full = _resident()
    del gone
    assert _resident() > full - (8 << 20), "a gap is memory until it is given back"
    shelf.give_back()
    assert _resident() < full - ((megabytes - 8) << 20)
    again = torch.full(((megabytes - 1) << 18,), 2.0)
    shelf.move([again])
    assert torch.equal(kept, before) and bool((again == 2).all())


@pytest.mark.skipif(sys.platform != "linux", reason="gaps are given back on Linux alone")
def test_a_library_that_cannot_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketsize.models.shelf.ctypes.CDLL", lambda name: object())
    shelf = Shelf(1 << 20)
    shelf.tidy(1 << 40)
    shelf.give_back()
