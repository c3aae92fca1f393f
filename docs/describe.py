"""Parts of the pages, made from the code and the records: one function for each, by its name in `PARTS`."""

from __future__ import annotations

import ast
import html
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import click
import yaml
from benchmarks.tables import bars_table, benchmark, paths, rows_table

import pocketsize
from pocketsize import api, errors
from pocketsize.cli import main as command_line
from pocketsize.cli.main import WORDS
from pocketsize.data.sources import Source
from pocketsize.exporting.artifact import Artifact
from pocketsize.exporting.verify import Check
from pocketsize.measurement import classes as by_class
from pocketsize.measurement import embedding, quality
from pocketsize.measurement.measurement import Measurement
from pocketsize.models.arch import Arch, Cuts, Linears, arch_of, families
from pocketsize.models.model import Origin
from pocketsize.recipes import record
from pocketsize.recipes.recipe import KEYS, Data, Recipe
from pocketsize.recipes.table import STEPS
from pocketsize.search.ladder import FOLDER, GGUF

DOCS = Path(__file__).parent
SOURCE = Path(inspect.getfile(pocketsize)).parent
MEANINGS: Mapping[str, Mapping[str, str]] = yaml.safe_load((DOCS / "meanings.yaml").read_text())
RECORDS = (
    record.RunRecord,
    Origin,
    record.TextRecord,
    record.StepReport,
    record.LayerReport,
    record.Stage,
    record.TrainingReport,
    record.Zeros,
    record.Finding,
    Measurement,
    Artifact,
    record.SizePart,
    record.Timing,
)
CLASSES = (
    api.Gptq,
    api.Qat,
    api.Awq,
    api.SmoothQuant,
    api.Rtn,
    api.Hqq,
    api.Rotate,
    api.Layers,
    api.Student,
    api.Prune,
    api.Oats,
    api.Distill,
    api.Finetune,
    api.Gradual,
    api.Gate,
    Data,
    Source,
    Recipe,
    api.Result,
    api.Gates,
    api.Tally,
    api.Plan,
    api.Model,
    Check,
)
FUNCTIONS = (
    *(api.shrink, api.quantize, api.distill, api.prune, api.finetune, api.run),
    *(api.plan, api.load, api.gated, api.verify, api.result),
)


def options(name: str) -> str:
    """The keys of a step, of `data`, of a source or of a recipe: type and default from the dataclass."""
    kind = {"recipe": Recipe, "data": Data, "source": Source, **STEPS}[name]
    found = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    keys = KEYS if name == "recipe" else tuple(found)
    meanings = _meanings(name, keys)
    rows = [[f"`{key}`", _values(found[key]), _default(found[key]), meanings[key]] for key in keys]
    return table(["key", "values", "default", "meaning"], rows)


def findings() -> str:
    """Every finding a run can have, by its code."""
    codes: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Finding" and node.args:
                codes.add(ast.literal_eval(node.args[0]))
    meanings = _meanings("findings", sorted(codes))
    return table(["code", "what it says"], [[f"`{code}`", meanings[code]] for code in sorted(codes)])


def commands() -> str:
    """Every command, with its arguments and options, as click knows them."""
    parts = []
    for word, said in WORDS.items():
        command = importlib.import_module(f"pocketsize.cli.{word}").command
        ctx = click.Context(command, info_name=f"pocketsize {word}", max_content_width=100)
        usage = command.get_usage(ctx).removeprefix("Usage: ")
        text = inspect.cleandoc(command.help or said).replace("\b\n", "")
        rows = [p.get_help_record(ctx) for p in command.params]
        shown = [[f"`{row[0]}`", row[1]] for row in rows if row]
        parts += [f"## {word}", f"```text\n{usage}\n```", text, table(["option", "meaning"], shown)]
    return "\n\n".join(part for part in parts if part)


def words() -> str:
    """The commands in one table, each a link to its section."""
    return table(["command", ""], [[f"[`{word}`](#{word})", said] for word, said in WORDS.items()])


def exit_codes() -> str:
    """Every exit code: those of the errors, and those that `cli/main.py` gives beside them."""
    rows = {0: ["0", "", "Done."]}
    for kind in (errors.PocketsizeError, *errors.PocketsizeError.__subclasses__(), errors.Stopped):
        said = inspect.getdoc(kind) or ""
        rows[kind.exit_code] = [str(kind.exit_code), f"`{kind.word}`", said.splitlines()[0]]
    rows[errors.PocketsizeError.exit_code][2] = "An error that should not have been: a bug of ours."
    for word, message, code in _failures():
        rows.setdefault(code, [str(code), f"`{word}`", f"{message[0].upper()}{message[1:]}."])
    return table(["code", "word", "meaning"], [rows[code] for code in sorted(rows)])


def _failures() -> list[tuple[str, str, int]]:
    """Calls of `_fail` in the command line that say their word, message and code outright."""
    found = []
    for node in ast.walk(ast.parse(Path(inspect.getfile(command_line)).read_text())):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) != "_fail":
            continue
        said = [arg.value for arg in node.args[:3] if isinstance(arg, ast.Constant)]
        if len(said) == 3:
            found.append((str(said[0]), str(said[1]), int(str(said[2]))))
    return found


def functions() -> str:
    """The verbs of the package: signature and docstring."""
    parts = []
    for function in FUNCTIONS:
        where = "ps" if function.__name__ in pocketsize.__all__ else "pocketsize.api"
        parts += [
            f"## {where}.{function.__name__}",
            f"```python\n{_signature(function)}\n```",
            _doc(function),
        ]
    return "\n\n".join(parts)


def classes() -> str:
    """The types that the verbs take and give."""
    return "\n\n".join(_class(kind, _home(kind)) for kind in CLASSES)


def record_types() -> str:
    """Everything a record holds."""
    return "\n\n".join(_class(kind, kind.__name__) for kind in RECORDS)


def arch_types() -> str:
    """What the literal of a family can say."""
    return "\n\n".join(_class(kind, kind.__name__) for kind in (Arch, Linears, Cuts))


def measurements() -> str:
    """The measurements of quality, with unit and method."""
    rows = [[f"`{n}`", u, b, m] for n, (u, b, m) in quality._TABLE.items()]
    rows += [[f"`{n}`", "1", b, m] for n, (b, m) in embedding._TABLE.items()]
    rows += [[f"`{n}`", u, b, m] for n, (u, b, m) in by_class._TABLE.items()]
    return table(["name", "unit", "better", "what it is"], rows)


def family_table() -> str:
    """The families by what they do and where they go."""
    rows = []
    for name in families():
        arch = arch_of(name)
        formats = (
            "nothing in it can be quantized" if arch.refuses else "folder, GGUF" if arch.gguf else "folder"
        )
        kind = "language model" if arch.task == "generate" else "encoder"
        rows.append([f"`{name}`", kind, "yes" if arch.experts else "", _narrower(arch), formats])
    return table(["`model_type`", "kind", "experts", "becomes narrower", "exports"], rows)


def _narrower(arch: Arch) -> str:
    """What of a family can be cut."""
    if arch.cuts is None:
        return ""
    if not arch.cuts.heads:
        return "inner channels"
    return "heads with width, channels" if arch.cuts.square else "heads, keys, channels, width"


def decisions() -> str:
    """The decision notes, by number."""
    rows = []
    for path in sorted((DOCS / "decisions").glob("0*.md")):
        number, _, title = path.read_text().splitlines()[0].removeprefix("# ").partition(". ")
        rows.append([number, f"[{title}]({path.name})"])
    return table(["", "decision"], rows)


def bars(folder: str, page: str) -> str:
    """The bars of a record, or of `all`, each with a link to its benchmark on `page`."""
    return bars_table(folder, f"{page}#{{folder}}")


def benchmarks() -> str:
    """Every benchmark as a section."""
    names = sorted(path.parent.name for path in paths())
    return "\n\n".join(f"## {name}\n\n{benchmark(name)}" for name in names)


def examples() -> str:
    """Every example: what it is for, how it is called, and its text."""
    parts = []
    for path in sorted((DOCS.parent / "examples").glob("*.py")):
        text = path.read_text()
        said, _, rest = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")
        code = text.split('"""', 2)[2].strip()
        calls, _, notes = rest.partition("\n\n")
        parts += [f"## {path.name}", said, f"```sh\n{calls}\n```", notes, f"```python\n{code}\n```"]
    recipe = (DOCS.parent / "examples" / "recipe.yaml").read_text().strip()
    parts += ["## recipe.yaml", f"```yaml\n{recipe}\n```"]
    return "\n\n".join(part for part in parts if part)


def rungs(export: str) -> str:
    """The rungs of the ladder that `shrink` climbs, smallest file last."""
    return "\n".join(
        f"{i}. {rung.name}" for i, rung in enumerate({"gguf": GGUF, "folder": FOLDER}[export], 1)
    )


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(re.sub(r"(?<!\\)\|", r"\\|", text).split())


def _code(text: str) -> str:
    """Code in a cell; a bar in it would end the cell, and escaped it would be shown with its escape."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def _meanings(name: str, keys: Any) -> Mapping[str, str]:
    known = MEANINGS[name]
    if differ := set(known) ^ set(keys):
        raise SystemExit(
            f"docs/meanings.yaml: {name}: {', '.join(sorted(differ))} is only here or only in the code"
        )
    return known


def _values(f: Field[Any]) -> str:
    said = re.sub(r"Literal\[.(\w+).\]", r"\1", str(f.type)).replace("Auto", "auto").replace("None", "null")
    said = said.replace("tuple[str, ...] | tuple[Source, ...]", "files or sources")
    for python, plain in (
        ("tuple[Step, ...]", "steps"),
        ("tuple[str, ...]", "names"),
        ("bool", "true, false"),
    ):
        said = said.replace(python, plain)
    for python, plain in (("str", "text"), ("int", "whole number"), ("float", "number"), ("Data", "texts")):
        said = re.sub(rf"\b{python}\b", plain, said)
    return said.replace(" | ", ", ")


def _default(f: Field[Any]) -> str:
    if f.default is MISSING and f.default_factory is MISSING:
        return "-"
    value = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc]
    if is_dataclass(value):
        return "(below)"
    plain = list(value) if isinstance(value, tuple) else value
    return f"`{yaml.safe_dump(plain, default_flow_style=True).splitlines()[0]}`"


def _initial(f: Field[Any]) -> str:
    """The default of a field as Python says it; a factory's as what it makes."""
    if f.default is MISSING and f.default_factory is MISSING:
        return ""
    if f.default is MISSING:
        name = getattr(f.default_factory, "__name__", "")
        return "empty" if name in ("dict", "list", "<lambda>") else f"`{name}()`"
    return "`Path()`" if isinstance(f.default, Path) else f"`{f.default!r}`".replace("'", '"')


def _doc(item: object) -> str:
    return inspect.getdoc(item) or ""


def _home(kind: type) -> str:
    name = kind.__name__
    return f"ps.{name}" if name in pocketsize.__all__ else f"pocketsize.api.{name}"


def _signature(function: Callable[..., object]) -> str:
    """A signature as one would write it, a line for each parameter."""
    signature, starred = inspect.signature(function), False
    lines = [f"{function.__name__}("]
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            lines.append("    *,")
            starred = True
        stars = "**" if p.kind is p.VAR_KEYWORD else ""
        default = "" if p.default is p.empty else f" = {p.default!r}".replace("'", '"')
        lines.append(f"    {stars}{p.name}: {p.annotation}{default},")
    return "\n".join([*lines, f") -> {signature.return_annotation}"])


def _class(kind: type, heading: str) -> str:
    """A dataclass: its fields in a table, its docstring, and what else it answers."""
    parts = [f"## {heading}", _doc(kind)]
    said = {f.name: re.sub(r"\bAuto\b", '"auto"', str(f.type)) for f in fields(kind)}
    rows = [[f"`{f.name}`", _code(said[f.name]), _initial(f)] for f in fields(kind)]  # type: ignore[arg-type]
    parts.append(table(["field", "type", "default"], rows))
    answers = []
    for name, item in vars(kind).items():
        if name.startswith("_") or not (isinstance(item, property) or inspect.isfunction(item)):
            continue
        call = "" if isinstance(item, property) else "()"
        answers.append([f"`{name}{call}`", _doc(item).split("\n\n")[0]])
    return "\n\n".join(part for part in [*parts, table(["also", ""], answers)] if part)


PARTS: Mapping[str, Callable[..., str]] = {
    "options": options,
    "findings": findings,
    "commands": commands,
    "words": words,
    "exit-codes": exit_codes,
    "functions": functions,
    "classes": classes,
    "record-types": record_types,
    "arch-types": arch_types,
    "measurements": measurements,
    "families": family_table,
    "decisions": decisions,
    "bars": bars,
    "rows": rows_table,
    "benchmarks": benchmarks,
    "rungs": rungs,
    "examples": examples,
}
