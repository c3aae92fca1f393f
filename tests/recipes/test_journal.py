from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pocketsize.errors import IntegrityError
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme
from pocketsize.recipes.journal import Journal, fingerprint_in, open_journal, working
from pocketsize.recipes.record import LayerReport

PRINT = {"recipe": "a", "threads": "1"}


def unit(seed: int) -> tuple[dict[str, object], tuple[LayerReport, ...]]:
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    return {f"w{seed}": rtn(W, Scheme(4, 32))}, (LayerReport(f"w{seed}", 8, 64, 4, 4.6, 0.01, 0.02),)


def filled(folder: Path, units: int = 3) -> Journal:
    journal = open_journal(folder, PRINT)
    for i in range(units):
        journal.keep(f"u{i}", *unit(i))  # type: ignore[arg-type]
    return journal


def test_what_was_kept_comes_back_exactly(tmp_path: Path) -> None:
    filled(tmp_path / "w")
    journal = open_journal(tmp_path / "w", PRINT)
    assert journal.resumed == 3 and journal.finished("u3") is None
    for i in range(3):
        weights, reports = unit(i)
        assert journal.finished(f"u{i}") == reports
        ours, theirs = journal.weights()[f"w{i}"], weights[f"w{i}"]
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scale, theirs.scale)  # type: ignore[attr-defined]
        assert ours.scheme == theirs.scheme  # type: ignore[attr-defined]


def test_the_folder_goes_when_the_work_is_done_or_none_was_begun(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "w"
    with working(folder):
        filled(folder)
    assert not folder.exists() and (tmp_path / "a").exists()
    with pytest.raises(RuntimeError), working(tmp_path / "b" / "w"):
        raise RuntimeError("before any work")
    assert not (tmp_path / "b").exists()
    with pytest.raises(RuntimeError), working(folder):
        filled(folder)
        raise RuntimeError("in the middle")
    assert open_journal(folder, PRINT).resumed == 3


def test_another_job_is_refused_with_old_and_new_value(tmp_path: Path) -> None:
    filled(tmp_path / "w")
    with pytest.raises(IntegrityError, match=r"threads was '1' and is now '2'"):
        open_journal(tmp_path / "w", PRINT | {"threads": "2"})
    assert open_journal(tmp_path / "w", PRINT).resumed == 3  # nothing was lost by asking


def test_a_journal_without_finished_units_binds_nobody(tmp_path: Path) -> None:
    open_journal(tmp_path / "w", PRINT)
    assert open_journal(tmp_path / "w", PRINT | {"threads": "2"}).resumed == 0
    assert fingerprint_in(tmp_path / "w")["threads"] == "2"


@pytest.mark.parametrize("place", range(4))
def test_a_flipped_bit_in_the_journal_is_found(place: int, tmp_path: Path) -> None:
    filled(tmp_path / "w")
    path = tmp_path / "w" / "journal"
    lines = path.read_bytes().split(b"\n")
    lines[place] = bytes([*lines[place][:-9], lines[place][-9] ^ 1, *lines[place][-8:]])
    path.write_bytes(b"\n".join(lines))
    assert open_journal(tmp_path / "w", PRINT).resumed == max(0, place - 1)


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_line_cut_short_does_not_count(cut: int, tmp_path: Path) -> None:
    filled(tmp_path / "w")
    path = tmp_path / "w" / "journal"
    path.write_bytes(path.read_bytes()[:-cut])
    journal = open_journal(tmp_path / "w", PRINT)
    assert journal.resumed == 2 and journal.finished("u2") is None
    assert len(list((tmp_path / "w" / "objects").iterdir())) == 2
    journal.keep("u2", *unit(2))  # type: ignore[arg-type]
    assert open_journal(tmp_path / "w", PRINT).resumed == 3


def test_a_damaged_object_and_all_after_it_are_done_again(tmp_path: Path) -> None:
    filled(tmp_path / "w")
    line = json.loads((tmp_path / "w" / "journal").read_text().splitlines()[2].partition(" ")[2])
    held = tmp_path / "w" / "objects" / f"{line['object']}.safetensors"
    data = bytearray(held.read_bytes())
    data[-1] ^= 1
    held.write_bytes(data)
    journal = open_journal(tmp_path / "w", PRINT)
    assert journal.resumed == 1 and journal.finished("u1") is None and journal.finished("u0") is not None


def test_leftovers_are_dropped(tmp_path: Path) -> None:
    filled(tmp_path / "w")
    (tmp_path / "w" / "objects" / ".unnamed.partial").write_bytes(b"half")
    (tmp_path / "w" / "objects" / "unnamed.safetensors").write_bytes(b"half")
    open_journal(tmp_path / "w", PRINT)
    assert len(list((tmp_path / "w" / "objects").iterdir())) == 3
