"""What a finished run prints: every name as it is, and no line cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pocketsize.api import Result
from pocketsize.cli.summary import show
from pocketsize.recipes.record import Finding
from reporting.records import smollm2

WORDS = "a sentence that is a good deal longer than the eighty columns of a terminal: "


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    made = smollm2()
    findings = (Finding("few-tokens", f"{WORDS}[red]x[/y] :smile:", "model[/bold].weight"),)
    origin = replace(made.origin, name=f"[/z] a\x1b[31m {WORDS}")
    folder = Path("out[/x]") / ("long" * 30) / "undecodable\udcff"
    show(Result(folder, replace(made, origin=origin, findings=findings)), json_=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"[/z] a\\x1b[31m {WORDS} before and after"
    assert f"finding: {WORDS}[red]x[/y] :smile: (model[/bold].weight)" in lines
    assert lines[-1] == f"report: {folder}/report.html".replace("\udcff", "\\udcff")
    for artifact in made.artifacts:
        line = f"{artifact.format}: {folder / artifact.path} (".replace("\udcff", "\\udcff")
        assert sum(printed.startswith(line) for printed in lines) == 1


def test_rows_of_the_table_are_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    show(Result(Path("out"), smollm2()), json_=False)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "perplexity ratio" in line)
    assert "[" in line and "…" not in line


def test_sizes_are_told_once_for_each_artefact(capsys: pytest.CaptureFixture[str]) -> None:
    show(Result(Path("out"), smollm2()), json_=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if "bits per weight" in line]
    assert lines and all(line.startswith(("gguf: ", "folder: ")) for line in lines)


@pytest.mark.parametrize(
    ("bf16", "download", "said"),
    [
        (4.0, 4.0, "4.00 x smaller than bf16)"),
        (4.0, 8.0, "4.00 x smaller than bf16, 8.00 x smaller than the download)"),
        (0.5, 1.01, "2.00 x larger than bf16, as large as the download)"),
        (0.99, 0.25, "as large as bf16, 4.00 x larger than the download)"),
    ],
)
def test_smaller_and_larger_are_told_apart(
    bf16: float, download: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = smollm2()
    ratios = {"ratio_to_bf16": bf16, "ratio_to_download": download}
    measurements = tuple(
        replace(m, value=ratios[m.name]) if m.name in ratios else m for m in made.measurements
    )
    show(Result(Path("out"), replace(made, measurements=measurements)), json_=False)
    assert said in capsys.readouterr().out
