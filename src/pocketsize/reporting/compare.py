"""The before/after table: measurements of the original set beside those of the compressed model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pocketsize.exporting.artifact import Artifact
from pocketsize.measurement.measurement import Measurement
from pocketsize.recipes.record import RunRecord
from pocketsize.reporting.figure import FORMATS, NBSP, ORDER, Group, form_of, size, unit_of, words_of, written

ORIGINAL, COMPRESSED = "original", "compressed"


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure as it is printed: value, unit, 95 % interval, measured or estimated."""

    text: str
    unit: str
    interval: str
    kind: str


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement before and after, and how it came about.

    `where` names the artefact if it is not the model itself. `verdict` says what `change` means.
    """

    name: str
    label: str
    note: str
    where: str
    method: str
    kind: str
    samples: int | None
    original: Cell | None
    compressed: Cell | None
    change: str
    verdict: str

    @property
    def alone(self) -> bool:
        """Whether only one of both columns holds a figure."""
        return self.original is None or self.compressed is None


@dataclass(frozen=True, slots=True)
class SizeRow:
    """The weights as downloaded, as they would be in bf16, or as an artefact that ships."""

    name: str
    note: str
    bytes: int
    of_bf16: float
    of_download: float
    bits_per_weight: float | None
    ships: bool


def rows_of(record: RunRecord, group: Group) -> tuple[Row, ...]:
    """The rows of one table, known measurements first, each in the order of the record."""
    timed = [(m, True) for m in record.timing.measurements]
    chosen = [
        m
        for m, is_timed in [*((m, False) for m in record.measurements), *timed]
        if words_of(m.name, timed=is_timed).group == group
    ]
    # Speeds of two runtimes are no before and after: there the method has to be the same.
    rows = list(_paired(chosen, same_method=group == "speed"))
    if group == "speed":
        # Each figure of the original stands beside or before those of the artefacts.
        rows.sort(key=lambda row: row.original is None)
    else:
        rows.sort(key=lambda row: ORDER.index(row.name) if row.name in ORDER else len(ORDER))
    return tuple(rows)


def in_common(rows: Sequence[Row]) -> tuple[str, bool]:
    """What all rows share, to be said once: measured or estimated, and the samples if they agree too."""
    if len({row.kind for row in rows}) != 1:
        return "", False
    samples = {row.samples for row in rows}
    same_samples = len(samples) == 1
    count = f", n{NBSP}={NBSP}{rows[0].samples:,}" if same_samples and rows[0].samples is not None else ""
    return f"All {rows[0].kind}{count}.", same_samples


def how(row: Row, *, common: tuple[str, bool]) -> str:
    """How a row came about, less what is said once for the whole table."""
    said, same_samples = common
    parts = ["" if said else row.kind, row.note, row.method]
    if row.samples is not None and not same_samples:
        parts.append(f"n{NBSP}={NBSP}{row.samples:,}")
    return "; ".join(part for part in parts if part)


def size_rows(record: RunRecord) -> tuple[SizeRow, ...]:
    """The original as downloaded and in bf16, then every artefact, with ratios to both."""
    origin = record.origin
    density = {m.subject: m.value for m in record.measurements if m.name == "bits_per_weight"}
    listed = [("bf16 equivalent", "two bytes for each parameter", origin.bf16_bytes, False)]
    listed.append(("As downloaded", origin.dequantized_from or "", origin.source_bytes, False))
    listed += [(called(a.path), FORMATS.get(a.format, a.format), a.bytes, True) for a in record.artifacts]
    alone = len(record.artifacts) == 1
    bits = {
        called(a.path): density.get(a.path, density.get(COMPRESSED) if alone else None)
        for a in record.artifacts
    }
    bits["As downloaded"] = density.get(ORIGINAL)
    return tuple(
        SizeRow(
            name=name,
            note=note,
            bytes=count,
            of_bf16=count / origin.bf16_bytes if origin.bf16_bytes else 0.0,
            of_download=count / origin.source_bytes if origin.source_bytes else 0.0,
            bits_per_weight=bits.get(name),
            ships=ships,
        )
        for name, note, count, ships in listed
        if ships or count > 0
    )


def figure_named(record: RunRecord, name: str, subject: str = COMPRESSED) -> Measurement | None:
    """The first measurement with that name of that subject, or none."""
    found = (m for m in record.measurements if m.name == name and m.subject == subject)
    return next(found, None)


def called(path: str) -> str:
    """The name of an artefact; the folder itself is stored as a dot."""
    return "Folder" if path in (".", "") else path


def _where(subject: str) -> str:
    return "the folder" if subject in (".", "") else subject


def _paired(measurements: Iterable[Measurement], *, same_method: bool) -> Iterable[Row]:
    """Each figure that is not of the original with its counterpart, then originals left alone."""
    measurements = list(measurements)
    used: set[int] = set()
    for m in measurements:
        if m.subject == ORIGINAL:
            continue
        i = _counterpart(m, measurements, same_method=same_method)
        if i is not None:
            used.add(i)
        yield _row(None if i is None else measurements[i], m)
    for i, m in enumerate(measurements):
        if m.subject == ORIGINAL and i not in used:
            yield _row(m, None)


def _counterpart(m: Measurement, among: list[Measurement], *, same_method: bool) -> int | None:
    """Index of the original's figure that `m` may be compared with."""
    named = [i for i, o in enumerate(among) if (o.subject, o.name, o.unit) == (ORIGINAL, m.name, m.unit)]
    exact = [i for i in named if among[i].method == m.method]
    if exact:
        return exact[0]
    return named[0] if len(named) == 1 and not same_method else None


def _row(before: Measurement | None, after: Measurement | None) -> Row:
    shown = [m for m in (before, after) if m is not None]
    first = shown[-1]
    words = words_of(first.name)
    change, verdict = _change(before, after) if before and after else ("", "")
    return Row(
        name=first.name,
        label=words.label,
        note=words.note,
        where="" if first.subject in (ORIGINAL, COMPRESSED) else _where(first.subject),
        method="; ".join(dict.fromkeys(m.method for m in shown if m.method)),
        kind=" and ".join(dict.fromkeys(m.kind for m in shown)),
        samples=first.samples,
        original=_cell(before),
        compressed=_cell(after),
        change=change,
        verdict=verdict,
    )


def _cell(m: Measurement | None) -> Cell | None:
    if m is None:
        return None
    form = form_of(m)
    interval = ""
    if m.low is not None and m.high is not None:
        low, high = (written(end, form, like=m.value) for end in (m.low, m.high))
        interval = f"{low.removesuffix(f'{NBSP}%')} to {high}" if form == "percent" else f"{low} to {high}"
    return Cell(written(m.value, form), unit_of(m), interval, m.kind)


def _change(before: Measurement, after: Measurement) -> tuple[str, str]:
    """The relative change in per cent, and whether it is for the better."""
    if before.value == 0:
        return ("", "")
    share = after.value / before.value - 1
    if abs(share) < 0.0005:
        return ("±0", "same")
    rose = share > 0
    verdict = "better" if rose == (after.better == "higher") else "worse"
    if share >= 1:
        return (f"{after.value / before.value:.1f}×", verdict)
    return (f"{'+' if rose else '−'}{abs(100 * share):.1f}{NBSP}%", verdict)


def summary(record: RunRecord) -> str:
    """One sentence with the figures that matter: how much smaller, and how much was kept."""
    parts = [text for text in (_smaller(record), _kept(record)) if text]
    return ", ".join(parts) if parts else f"{record.origin.name}, compressed"


def quantizes(record: RunRecord) -> bool:
    """Whether a step stored linears in fewer bits."""
    return any(step.layers and step.kind not in ("prune", "oats") for step in record.steps)


def in_transformers(record: RunRecord) -> str:
    """What the folder does in stock transformers; nothing where none was written, or nothing quantized."""
    if not quantizes(record) or not any(artifact.format == "folder" for artifact in record.artifacts):
        return ""
    return (
        "Stock transformers unpacks the folder to a dense model as it loads it: the folder is smaller to "
        "keep and to send, but runs neither faster nor in less memory than the same model unquantized."
    )


def smallest(record: RunRecord) -> Artifact | None:
    """The artefact with the fewest bytes, or none if nothing was exported."""
    return min(record.artifacts, key=lambda artifact: artifact.bytes, default=None)


def _smaller(record: RunRecord) -> str:
    ships, bf16 = smallest(record), record.origin.bf16_bytes
    if ships is None or ships.bytes <= 0 or bf16 <= 0:
        return ""
    times = bf16 / ships.bytes
    return f"{times:.1f}× smaller than bf16" if times >= 1 else f"{size(ships.bytes)}, larger than bf16"


# The figures that `--keep` asks for, and of what they are a share.
_KEPT = (
    ("perplexity_ratio", "perplexity"),
    ("spearman", "similarity ranking"),
    ("accuracy_ratio", "accuracy"),
    ("agreement", "choices"),
)


def _kept(record: RunRecord) -> str:
    ships = smallest(record)
    for name, what in _KEPT:
        m = (ships and figure_named(record, name, ships.path)) or figure_named(record, name)
        if m is not None:
            return f"{written(m.value, 'percent')} of the {what} kept"
    return ""
