"""Tables of README.md from benchmarks/*/record.json: `python -m benchmarks.tables [--check]`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md"]
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
LINK = "benchmarks/{folder}/README.md"
# Keys of a row in the order they are shown, with their headings; others follow under their own names.
COLUMNS = {
    "model": "model",
    "way": "way",
    "weights": "weights of",
    "type": "type",
    "method": "method",
    "text": "text",
    "side": "side",
    "bits": "bits",
    "sequences": "windows",
    "tokens": "tokens",
    "seeds": "seeds",
    "perplexity_original": "perplexity, original",
    "perplexity": "perplexity",
    "ratio": "ratio",
    "bits_per_weight": "bits per weight",
    "kl": "KL, nats per token",
    "top1": "top-1",
    "perplexity_ratio": "perplexity ratio",
    "one_minus_cosine": "1 - cosine",
    "spearman": "Spearman",
    "cpu_s": "CPU s",
    "rss_peak_mb": "peak MB",
}
LEFT_OUT = {"dtype", "threads", "length", "wall_s", "load_1min", "kl_p99"}


def bars_table(name: str, link: str = LINK) -> str:
    """The bars of one record as a table; `link` leads to the record's own page."""
    folder, record = read(name)
    lines = ["| measured | value | bar | met |", "| --- | ---: | ---: | --- |"]
    for bar in record["bars"]:
        value, target = _value_and_target(bar)
        met = "yes" if bar["met"] else "**no**"
        lines.append(f"| [{bar['name']}]({link.format(folder=folder)}) | {value} | {target} | {met} |")
    return "\n".join(lines) + "\n"


def summary_table() -> str:
    """What each record asks, how many of its bars are met, and those that are not, with their figures."""
    lines = ["| asked | bars met | not met |", "| --- | ---: | --- |"]
    for path in sorted(paths()):
        folder, record = read(path.parent.name)
        missed = [bar for bar in record["bars"] if not bar["met"]]
        told = "; ".join("{}: {} ({})".format(bar["name"], *_value_and_target(bar)) for bar in missed)
        met = f"{len(record['bars']) - len(missed)} of {len(record['bars'])}"
        lines.append(f"| [{record['question']}]({LINK.format(folder=folder)}) | {met} | {told} |")
    return "\n".join(lines) + "\n"


def _value_and_target(bar: Mapping[str, Any]) -> tuple[str, str]:
    value, target = (f"{bar[key]:.3g} {bar['unit']}".strip() for key in ("value", "target"))
    return value, f"{'<=' if bar['better'] == 'lower' else '>='} {target}"


def rows_table(name: str) -> str:
    """What each side reached, as a table: medians over seeds, with least and greatest where they differ."""
    rows = read(name)[1]["rows"]
    found = dict.fromkeys(key for row in rows for key, value in row.items() if _is_plain(value))
    keys = [key for key in COLUMNS if key in found]
    untold = LEFT_OUT - ({"threads"} if _threads_vary(rows) else set())
    keys += [key for key in found if key not in COLUMNS and key not in untold]
    words = {key for key in keys if any(isinstance(row.get(key), str) for row in rows)}
    headings = [COLUMNS.get(key, key.replace("_", " ")) for key in keys]
    lines = [headings, ["---" if key in words else "---:" for key in keys]]
    lines += [[_shown(row.get(key, "")) for key in keys] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def benchmark(name: str) -> str:
    """One benchmark as a section: question, bars, rows, protocol, machine, versions."""
    _, record = read(name)
    machine, date, threads = record["machine"], record["date"], record["threads"]
    cores = f"{machine['cpu']}, {machine['cores']} cores"
    if not _threads_vary(record["rows"]):
        cores += f"; {threads} thread{'' if threads == 1 else 's'} used"
    versions = ", ".join(f"{what} {version}" for what, version in record["versions"].items())
    return "\n\n".join(
        (
            f"**{record['question']}**",
            f"Measured on {date} ({cores}), by `benchmarks/{name}/run.py`.",
            *_plot(name),
            _unlinked(bars_table(name)),
            rows_table(name),
            "\n".join(f"- {sentence}" for sentence in record.get("protocol", ())),
            f"Versions: {versions}.",
        )
    )


def _plot(name: str) -> list[str]:
    """What is drawn of a record, where something is: inline, so that it has the colours of its page."""
    path = ROOT / "benchmarks" / name / "plot.svg"
    return [f"<figure>{path.read_text(encoding='utf-8').strip()}</figure>"] if path.is_file() else []


def paths() -> list[Path]:
    """All records."""
    return list((ROOT / "benchmarks").glob("*/record.json"))


def read(folder: str) -> tuple[str, dict[str, Any]]:
    """A record with the folder it stands in."""
    return folder, json.loads((ROOT / "benchmarks" / folder / "record.json").read_text())


def _threads_vary(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows were measured on different numbers of threads, so that each has to tell its own."""
    return len({row.get("threads") for row in rows}) > 1


def _unlinked(text: str) -> str:
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)


def _is_plain(value: object) -> bool:
    """Whether a cell can show it: a word, a number, a list to count, or a median with its ends."""
    return not isinstance(value, dict) or "median" in value


def _shown(value: object) -> str:
    if isinstance(value, dict):
        middle, *ends = (_shown(value[key]) for key in ("median", "min", "max"))
        return middle if ends == [middle, middle] else f"{middle} ({ends[0]} to {ends[1]})"
    if isinstance(value, list):
        return str(len(value))
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def main() -> int:
    """Write the tables; with --check, only say whether they are stale."""
    stale: list[str] = []
    for page in PAGES:
        text = page.read_text()
        fresh = MARK.sub(
            lambda m: m[1] + (summary_table() if m[2] == "all" else bars_table(m[2])) + m[3], text
        )
        if fresh != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(fresh)
    if stale and "--check" in sys.argv:
        print(f"stale tables in {', '.join(stale)}: run python -m benchmarks.tables")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
