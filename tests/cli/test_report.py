"""`pocketsize report`: the page again, from the record alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pocketsize.cli.report import command
from pocketsize.errors import DataError, UsageError
from pocketsize.exporting.manifest import check_manifest, write_manifest
from pocketsize.recipes.record import read_record
from pocketsize.reporting.page import report_html
from reporting.records import smollm2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "record.json").write_text(smollm2().to_json(), encoding="utf-8")
    return tmp_path


def test_it_writes_the_page_into_the_folder(folder: Path) -> None:
    done = CliRunner().invoke(command, [str(folder)], catch_exceptions=False)
    assert done.exit_code == 0 and done.output == f"report: {folder / 'report.html'}\n"
    made = read_record(folder / "record.json")
    assert (folder / "report.html").read_text(encoding="utf-8") == report_html(made)


def test_it_writes_elsewhere_and_says_so_as_json(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = CliRunner().invoke(command, [str(folder), "-o", str(page), "--json"], catch_exceptions=False)
    facts = json.loads(done.output)
    assert facts["report"] == str(page) and facts["bytes"] == page.stat().st_size
    assert not (folder / "report.html").exists()


def test_no_record_is_bad_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"record\.json: not there"):
        CliRunner().invoke(command, [str(tmp_path)], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


def test_a_record_of_another_schema_is_bad_data(folder: Path) -> None:
    (folder / "record.json").write_text('{"schema": 99}')
    with pytest.raises(DataError, match="schema 99"):
        CliRunner().invoke(command, [str(folder)], catch_exceptions=False)
    assert not (folder / "report.html").exists()


def test_a_folder_is_no_page(folder: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        CliRunner().invoke(command, [str(folder), "-o", str(folder)], catch_exceptions=False)


def test_the_manifest_takes_up_the_page_and_nothing_else(folder: Path) -> None:
    (folder / "report.html").write_text("old")
    write_manifest(folder)
    (folder / "record.json").write_text(smollm2().to_json() + " ")
    CliRunner().invoke(command, [str(folder)], catch_exceptions=False)
    assert check_manifest(folder) == ["record.json: its bytes are not those that were written"]
