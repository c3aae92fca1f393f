"""`pocketsize report`: the report page of a finished folder, written again."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pocketsize.cli import options


@click.command(name="report")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), help="Page to write. Default: DIR/report.html."
)
@options.as_json
def command(folder: Path, out: Path | None, json_: bool) -> None:
    """Write the report page of the finished folder DIR again, from its record.json alone."""
    from pocketsize.errors import DataError, UsageError
    from pocketsize.exporting.manifest import renew_entry
    from pocketsize.io.publish import publish_bytes
    from pocketsize.recipes.record import read_record
    from pocketsize.reporting.page import report_html

    if not (folder / "record.json").is_file():
        raise DataError(f"{folder / 'record.json'}: not there; name the output folder of a finished run")
    page = folder / "report.html" if out is None else out
    if page.is_dir():
        raise UsageError(f"{page}: is a folder; name a file, such as {page / 'report.html'}")
    html = report_html(read_record(folder / "record.json")).encode()
    sha256 = publish_bytes(page, html)
    if page == folder / "report.html" and (folder / "MANIFEST.json").is_file():
        renew_entry(folder, "report.html")
    if json_:
        click.echo(json.dumps({"report": str(page), "bytes": len(html), "sha256": sha256}))
    else:
        click.echo(f"report: {page}")
