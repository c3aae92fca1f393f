"""The report: one self-contained page made from a record, without scripts and without requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pocketsize.io.console import duration
from pocketsize.recipes.record import LayerReport, RunRecord, Stage, StepReport, TrainingReport
from pocketsize.reporting import chart, compare, figure
from pocketsize.reporting.course import course
from pocketsize.reporting.curve import curve
from pocketsize.reporting.layers import MOST_PANELS, layout

MOST_LAYERS = 400
MOST_PARTS = 8
PART_NAMES = {
    "linears": "Linear layers",
    "embeddings": "Embeddings and head",
    "rest": "Norms, biases and the rest",
    "metadata": "Metadata",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """One panel of the error plot with its caption."""

    kind: str
    bits: str
    svg: Markup


# What the errors of a step are held against, where that is not round-to-nearest.
_SMALLEST = ("dropping as many of the smallest weights", "dropping the smallest")
_BESIDE = {"prune": _SMALLEST, "oats": _SMALLEST}


@dataclass(frozen=True, slots=True)
class ErrorPlot:
    """What one step did to each layer: panels, layers outside the blocks, and the table behind them.

    `beside` and its `short` form name what errors are held against.
    """

    method: str
    beside: str
    short: str
    is_rtn: bool
    plots: tuple[Plot, ...]
    outside: tuple[LayerReport, ...]
    table: tuple[LayerReport, ...]
    is_cut: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One segment of a size bar: its colour class, name, bytes, share and bits per weight."""

    role: str
    name: str
    bytes: int
    share: float
    bits: float | None


_FORMS = {
    "gguf": "as GGUF",
    "folder": "as a folder of safetensors",
    "gptq": "as a GPTQ checkpoint",
    "gptq_v2": "as a GPTQ checkpoint of the second version",
    "awq": "as an AWQ checkpoint",
    "bitsandbytes": "as an NF4 checkpoint",
}


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Where the bytes of one artefact go; the bar is drawn to the scale of the largest."""

    name: str
    bytes: int
    svg: Markup
    parts: tuple[Part, ...]


def report_html(record: RunRecord) -> str:
    """One HTML page that shows everything in the record; the same record gives the same page."""
    environment = Environment(
        loader=PackageLoader("pocketsize", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: figure.clean(value) if type(value) is str else value,
    )
    environment.filters |= {
        "bytes": figure.size,
        "percent": figure.percent,
        "number": figure.number,
        "duration": duration,
    }
    steps = [error_plot(step) for step in record.steps if step.layers]
    return environment.get_template("template.html.j2").render(
        record=record,
        headline=compare.summary(record),
        lead=lead(record),
        pocket=Markup(chart.pocket(_pocket_sizes(record))),
        smallest=compare.smallest(record),
        sentence=_sentence,
        called=compare.called,
        formats=figure.FORMATS,
        in_common=compare.in_common,
        how=compare.how,
        quality=compare.rows_of(record, "quality"),
        speed=compare.rows_of(record, "speed"),
        in_transformers=compare.in_transformers(record),
        other=compare.rows_of(record, "other"),
        files=compare.size_rows(record),
        plots=steps,
        trainings=[step for step in record.steps if step.training],
        taught=taught,
        course=lambda report: Markup(course(report)),
        curve=lambda mixture: Markup(curve(mixture)),
        breakdowns=breakdowns(record),
        recipe=yaml.safe_dump(_plain(record.recipe), sort_keys=False, allow_unicode=True),
        machine=machine_facts(record),
        timing=timing_facts(record),
        origin=origin_facts(record),
    )


def lead(record: RunRecord) -> tuple[str, ...]:
    """The sentences under the headline: from what to what, and what the quality figures mean."""
    origin, ships = record.origin, compare.smallest(record)
    sentences = [f"{figure.number(origin.parameters)} parameters, {figure.size(origin.bf16_bytes)} in bf16"]
    if ships is not None:
        form = _FORMS.get(ships.format, f"as {ships.format}")
        sentences[0] += f", now {figure.size(ships.bytes)} {form}"
    kl, top1 = (compare.figure_named(record, name) for name in ("kl_mean", "top1"))
    if kl is not None:
        sentences.append(
            f"The next-token distribution moved by {figure.number(kl.value)} {kl.unit} on average"
        )
    if top1 is not None:
        share = figure.percent(top1.value)
        sentences.append(f"Both models agree on the first choice for {share} of the held-out tokens")
    same = compare.figure_named(record, "agreement")
    if same is not None:
        sentences.append(f"Both models put {figure.percent(same.value)} of the texts into the same class")
    cosine = compare.figure_named(record, "one_minus_cosine")
    if cosine is not None:
        sentences.append(f"Embeddings moved by {figure.number(cosine.value)} (1 − cosine) on average")
    if origin.dequantized_from:
        sentences.append(
            f"All quality figures are relative to the dequantized release ({origin.dequantized_from})"
        )
    return tuple(sentence + "." for sentence in sentences)


def error_plot(step: StepReport) -> ErrorPlot:
    """The error plot of one step: the worst layers are listed when there are too many for a table."""
    placed = layout(step.layers)
    method = step.kind.upper()
    beside, short = _BESIDE.get(step.kind, ("round-to-nearest on the same grid (RTN)", "RTN"))
    plots = tuple(
        Plot(
            panel.kind,
            ", ".join(map(str, panel.bits)),
            Markup(
                chart.error_panel(
                    panel,
                    low=placed.low,
                    high=placed.high,
                    last_block=placed.last_block,
                    names=(method, short),
                )
            ),
        )
        for panel in placed.panels
    )
    compared = [layer for layer in step.layers if layer.rtn_error > 0]
    is_rtn = all(layer.error == layer.rtn_error for layer in compared)
    notes = [] if is_rtn or not compared else [_gain(compared, method, beside)]
    if placed.left_out:
        notes.append(
            f"{placed.left_out} more kinds of layers than the {MOST_PANELS} drawn are in record.json."
        )
    table, is_cut = step.layers, len(step.layers) > MOST_LAYERS
    if is_cut:
        table = tuple(sorted(table, key=lambda layer: -layer.error)[:MOST_LAYERS])
        notes.append(
            f"The table lists the {MOST_LAYERS} layers with the largest error; "
            f"all {len(step.layers):,} are in record.json."
        )
    raised = sum(layer.escalations > 0 for layer in step.layers)
    if raised:
        notes.append(f"Damping had to be raised for {raised} of {len(step.layers):,} layers.")
    if step.stages:
        notes.append(_told(step.stages))
    if any(stage.name == "tuned" and stage.kept for stage in step.stages):
        notes.append("Errors of layers are those before the whole model tuned its scales.")
    outside = placed.outside[:MOST_LAYERS]
    return ErrorPlot(method, beside, short, is_rtn, plots, outside, table, is_cut, tuple(notes))


def _told(stages: Sequence[Stage]) -> str:
    """What each stage of a step gave."""
    said = (f"{s.name} {figure.number(s.divergence)} ({'kept' if s.kept else 'dropped'})" for s in stages)
    return f"Distance from the original on calibration text that did not teach, by stage: {', '.join(said)}."


def taught(report: TrainingReport) -> str:
    """A sentence on who taught how large a student, how long; another on its zeros, if it has any."""
    who = f"taught by {', '.join(report.teachers)}" if report.teachers else "trained on the text alone"
    read = f"{figure.number(report.tokens)} tokens in {report.steps:,} steps"
    return (
        f"A student of {figure.number(report.parameters)} parameters, {who}: {read}, the text read "
        f"{figure.number(report.epochs)} times.{_zeros(report)}"
    )


def _zeros(report: TrainingReport) -> str:
    """How many weights are zero, and when they went."""
    if not report.zeros:
        return ""
    shares = sorted(one.zeros / one.weights for one in report.zeros)
    whole = sum(one.zeros for one in report.zeros) / sum(one.weights for one in report.zeros)
    said = f" Of the weights of its linears {whole:.1%} are zero, {shares[0]:.1%} to {shares[-1]:.1%} of each"
    if not report.pruned:
        return f"{said}; they were before."
    first, last = (
        next(step for step, share in report.pruned if share >= least) for least in (1e-9, whole - 1e-6)
    )
    return f"{said}; they went {f'from step {first:,.0f} to' if first < last else 'at'} step {last:,.0f}."


def breakdowns(record: RunRecord) -> tuple[Breakdown, ...]:
    """One bar for each artefact that has a size breakdown, all to one scale."""
    names = list(dict.fromkeys(part.artifact for part in record.sizes))
    totals = {a.path: a.bytes for a in record.artifacts}
    sums = {name: sum(p.bytes for p in record.sizes if p.artifact == name) for name in names}
    full = max([totals.get(name, 0) for name in names] + list(sums.values()), default=0)
    made = []
    for name in names:
        total = totals.get(name) or sums[name]
        parts = _parts(record, name, total)
        label = "; ".join(f"{part.name}: {figure.size(part.bytes)}" for part in parts)
        svg = chart.bar([(part.role, part.bytes) for part in parts], full=full, label=label)
        made.append(Breakdown(compare.called(name), total, Markup(svg), parts))
    return tuple(made)


def machine_facts(record: RunRecord) -> list[tuple[str, str]]:
    """The machine's facts in words: bytes as sizes, truths as yes and no, nothing where it is empty."""
    return [(_spoken(key), _fact(key, value)) for key, value in record.machine.items() if value != ""]


def timing_facts(record: RunRecord) -> list[tuple[str, str]]:
    """When the run was, how long its phases took, and what it needed."""
    timing = record.timing
    facts = (
        [("Started", timing.started.replace("T", " ").replace("+00:00", " UTC"))] if timing.started else []
    )
    facts += [(_spoken(name), duration(seconds)) for name, seconds in timing.phases_s.items()]
    if timing.cpu_s:
        facts.append(("Processor time", duration(timing.cpu_s)))
    if timing.peak_rss_bytes:
        facts.append(("Peak memory", figure.size(timing.peak_rss_bytes)))
    if timing.resumed:
        facts.append(("Taken over from an earlier start", f"{timing.resumed:,} pieces of work"))
    return facts


def origin_facts(record: RunRecord) -> list[tuple[str, str]]:
    """Where the original came from."""
    origin = record.origin
    facts = [("Name", origin.name), ("Licence", origin.licence), ("Revision", origin.revision)]
    facts += [("Parameters", figure.number(origin.parameters)), ("SHA-256", origin.sha256)]
    facts.append(("Dequantized from", origin.dequantized_from or ""))
    return [(name, value) for name, value in facts if value]


def _sentence(words: str) -> str:
    """The message with a capital first letter, unless it starts with a name such as a path."""
    first = words.split(" ", 1)[0]
    return words[:1].upper() + words[1:] if first.isalpha() else words


def _spoken(key: str) -> str:
    words = key.removesuffix("_bytes").replace("_", " ").strip()
    acronym = words in ("cpu", "gpu", "os", "awq", "gptq", "hqq", "rtn")
    return words.upper() if acronym else words[:1].upper() + words[1:]


def _fact(key: str, value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return figure.size(value) if key.endswith("_bytes") else figure.number(value)


def _parts(record: RunRecord, artifact: str, total: int) -> tuple[Part, ...]:
    """The parts of one artefact, largest first; the smallest are summed where there are many."""
    totals: dict[str, int] = {}
    for part in record.sizes:
        totals[part.part] = totals.get(part.part, 0) + part.bytes
    order = {name: i for i, name in enumerate(sorted(totals, key=lambda name: -totals[name]))}
    sized = sorted((p for p in record.sizes if p.artifact == artifact), key=lambda p: -p.bytes)
    listed = [
        (f"c{order[p.part] % MOST_PARTS}", PART_NAMES.get(p.part, p.part), p.bytes, p.parameters)
        for p in sized
    ]
    if len(listed) > MOST_PARTS:
        rest = listed[MOST_PARTS - 1 :]
        summed = ("c-rest", f"{len(rest)} other parts", sum(p[2] for p in rest), sum(p[3] for p in rest))
        listed = [*listed[: MOST_PARTS - 1], summed]
    return tuple(
        Part(role, name, count, count / total if total else 0.0, 8 * count / n if n else None)
        for role, name, count, n in listed
    )


def _gain(layers: list[LayerReport], method: str, beside: str) -> str:
    """One sentence: in how many layers the error is below what it is held against, and by how much."""
    ratios = sorted(layer.error / layer.rtn_error for layer in layers)
    better = sum(ratio < 1 for ratio in ratios)
    return (
        f"{method} leaves a smaller error than {beside} in {better:,} of {len(ratios):,} layers; "
        f"in the median layer it is {figure.percent(ratios[len(ratios) // 2])} of it."
    )


def _pocket_sizes(record: RunRecord) -> list[tuple[str, int]]:
    ships = compare.smallest(record)
    sizes = [("bf16", record.origin.bf16_bytes), ("download", record.origin.source_bytes)]
    return [*sizes, ("ships", ships.bytes)] if ships else sizes


def _plain(value: object) -> object:
    """The value as JSON would give it back, so that a record in memory and one read again look alike."""
    return json.loads(json.dumps(value, default=str))
