from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pocketsize.errors import BusyError, IntegrityError, ResourceError
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme
from pocketsize.recipes.journal import Journal, open_journal
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
    journal.close(remove=True)
    assert not (tmp_path / "w").exists()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    journal = filled(tmp_path / "w")
    with pytest.raises(BusyError, match="is working on this output"):
        open_journal(tmp_path / "w", PRINT)
    journal
    open_journal(tmp_path / "w", PRINT)


def test_another_job_is_refused_with_old_and_new_value(tmp_path: Path) -> None:
    filled(tmp_path / "w")
    with pytest.raises(IntegrityError, match=r"threads was '1' and is now '2'"):
        open_journal(tmp_path / "w", PRINT | {"threads": "2"})
    open_journal(tmp_path / "w", PRINT)  # nothing was lost by asking


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_line_cut_short_does_not_count(cut: int, tmp_path: Path) -> None:
    filled(tmp_path / "w")
    path = tmp_path / "w" / "journal"
    path.write_bytes(path.read_bytes()[:-cut])
    journal = open_journal(tmp_path / "w", PRINT)
    assert journal.resumed == 2 and journal.finished("u2") is None
    assert len(list((tmp_path / "w" / "objects").iterdir())) == 2
    journal.keep("u2", *unit(2))  # type: ignore[arg-type]
    journal
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 4


def test_a_damaged_object_and_all_after_it_are_done_again(tmp_path: Path) -> None:
    filled(tmp_path / "w")
    line = json.loads((tmp_path / "w" / "journal").read_text().splitlines()[2])
    held = tmp_path / "w" / "objects" / f"{line['object']}.safetensors"
    data = bytearray(held.read_bytes())
    data[-1] ^= 1
    held.write_bytes(data)
    journal = open_journal(tmp_path / "w", PRINT)
    assert journal.resumed == 1 and journal.finished("u1") is None and journal.finished("u0") is not None
    journal


def test_leftovers_are_dropped(tmp_path: Path) -> None:
    filled(tmp_path / "w")
    (tmp_path / "w" / "objects" / ".123.partial").write_bytes(b"half")
    (tmp_path / "w" / "objects" / "unnamed.safetensors").write_bytes(b"half")
    open_journal(tmp_path / "w", PRINT)
    assert len(list((tmp_path / "w" / "objects").iterdir())) == 3


def test_a_place_that_cannot_be_written_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="work folder"):
        open_journal(tmp_path / "file" / "w", PRINT)
