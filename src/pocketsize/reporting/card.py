"""The model card: README.md of an output folder, with the front matter that model hubs read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

import yaml

from pocketsize.recipes.record import RunRecord
from pocketsize.reporting import compare, figure

_PIPELINE = {
    "generate": "text-generation",
    "embed": "feature-extraction",
    "classify": "text-classification",
}
_AUTO = {
    "generate": "AutoModelForCausalLM",
    "embed": "AutoModel",
    "classify": "AutoModelForSequenceClassification",
}
_GENERATE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))"""
_EMBED = """\
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModel.from_pretrained(".", dtype="auto")
inputs = tokenizer(["a sentence", "another one"], padding=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
mask = inputs["attention_mask"].unsqueeze(-1)
embeddings = (hidden * mask).sum(1) / mask.sum(1)   # mean pooling over the real tokens"""

_CLASSIFY = """\
from transformers import pipeline

classify = pipeline("text-classification", model=".")
print(classify(["a text", "another one"]))"""
_SNIPPETS = {"generate": _GENERATE, "embed": _EMBED, "classify": _CLASSIFY}
_GPTQ = """\
from gptqmodel import GPTQModel

model = GPTQModel.load("{path}")
print(model.tokenizer.decode(model.generate("The capital of France is")[0]))"""
_AWQ = """\
from transformers import {auto}

model = {auto}.from_pretrained("{path}", dtype="auto")"""
# Who loads a format, what has to be installed, and the lines for it.
_PEERS = {
    "gptq": ("GPTQModel", "gptqmodel", _GPTQ),
    "gptq_v2": ("GPTQModel", "gptqmodel", _GPTQ),
    "awq": ("transformers", "transformers gptqmodel", _AWQ),
    "bitsandbytes": ("transformers", "transformers bitsandbytes accelerate", _AWQ),
}

_SPARSE = """With Pocketsize, {size}, zeros left out:

```sh
pocketsize measure {path}
```

Nothing else reads this form. Transformers warns of missing weights and goes on with random ones;
for a folder that it loads, choose `--target folder`."""


def model_card(record: RunRecord) -> str:
    """README.md for the record's output folder: what it is, how to run it, what was measured and how."""
    name = plain(record.origin.name)
    sections = [
        front_matter(record),
        f"# {name}, compressed\n\n{plain(compare.summary(record))}. "
        f"Made by Pocketsize {plain(record.version)}; `report.html` shows all that was measured, "
        "`record.json` holds it.",
        _how_to_run(record),
        _before_after(record),
        _protocol(record),
        _limits(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(record: RunRecord) -> str:
    """The YAML block of a model card: licence, base model, library, task and tags."""
    formats = {artifact.format for artifact in record.artifacts}
    kinds = list(dict.fromkeys(step.kind for step in record.steps))
    libraries = {{"gguf": "gguf", "sparse": "pocketsize"}.get(form, "transformers") for form in formats}
    library = libraries.pop() if len(libraries) == 1 else "transformers"
    packed = "folder" in formats and compare.quantizes(record)
    tags = ["pocketsize", *(["compressed-tensors"] if packed else []), *kinds]
    tags += [
        form
        for form in ("gguf", "gptq", "gptq_v2", "awq", "bitsandbytes")
        if form in formats and form not in tags
    ]
    facts: dict[str, object] = {**_licence(record.origin.licence)}
    # A hub takes only its own kind of name here; a local path would make the card invalid.
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", record.origin.name, re.ASCII):
        relation = "quantized" if compare.quantizes(record) else "finetune"
        facts |= {"base_model": record.origin.name, "base_model_relation": relation}
    facts["library_name"] = library
    if record.task in _PIPELINE:
        facts["pipeline_tag"] = _PIPELINE[record.task]
    facts["tags"] = [_line(tag) for tag in tags]
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=10**6)}---"


def plain(text: str) -> str:
    """Text as one line in which no character means anything to Markdown or HTML."""
    line = _line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", line)


def code(text: str) -> str:
    """Text as inline code that cannot end early, nor split a table cell."""
    return f"`{_line(text).replace('`', chr(39)).replace('|', '¦')}`"


def _line(text: str) -> str:
    """Text as one line; no-break spaces stay."""
    return re.sub(r"[ \t\n]+", " ", figure.clean(text)).strip()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    rule = ["---", *(["---:"] * (len(head) - 1))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _licence(licence: str) -> dict[str, object]:
    if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence.lower()):
        return {"license": licence.lower()}
    return {"license": "other", "license_name": _line(licence)}


def _how_to_run(record: RunRecord) -> str:
    parts = ["## How to run"]
    for artifact in record.artifacts:
        if artifact.format == "gguf":
            command = f"llama-cli -m {_shell(artifact.path)}"
            parts.append(f"With llama.cpp, {figure.size(artifact.bytes)}:\n\n```sh\n{command}\n```")
        elif artifact.format == "folder":
            snippet = _SNIPPETS.get(record.task, _GENERATE)
            packages = f"transformers{' compressed-tensors' if compare.quantizes(record) else ''}"
            parts.append(
                f"With transformers, {figure.size(artifact.bytes)}, in this folder "
                f"(`pip install {packages}`):\n\n```python\n{snippet}\n```"
            )
        elif artifact.format in _PEERS:
            where = "this folder" if artifact.path == "." else code(artifact.path)
            peer, packages, lines = _PEERS[artifact.format]
            auto = _AUTO.get(record.task, "AutoModel")
            parts.append(
                f"With {peer}, {figure.size(artifact.bytes)}, in {where} (`pip install {packages}`):\n\n"
                f"```python\n{lines.format(path=artifact.path, auto=auto)}\n```"
            )
        elif artifact.format == "sparse":
            where = "." if artifact.path == "." else _shell(artifact.path)
            parts.append(_SPARSE.format(size=figure.size(artifact.bytes), path=where))
        else:
            parts.append(f"{code(artifact.path)}: {plain(artifact.format)}, {figure.size(artifact.bytes)}.")
    parts.append("`pocketsize verify .` checks every file of this folder against its hash and its behaviour.")
    return "\n\n".join(parts)


def _before_after(record: RunRecord) -> str:
    weights = table(
        ["Weights", "Size", "Of bf16", "Of the download"],
        (
            (plain(r.name), figure.size(r.bytes), figure.percent(r.of_bf16), figure.percent(r.of_download))
            for r in compare.size_rows(record)
        ),
    )
    groups: tuple[figure.Group, ...] = ("quality", "other", "speed")
    measured = [_measured(rows) for rows in (compare.rows_of(record, group) for group in groups) if rows]
    return "\n\n".join(["## Before and after", weights, *measured])


def _measured(rows: Sequence[compare.Row]) -> str:
    """One table, with what its rows share said once below it."""
    common = compare.in_common(rows)
    listed = table(
        ["Measure", "Original", "Compressed", "95 % interval"],
        ((_named(r), _cell(r.original), _cell(r.compressed), _interval(r)) for r in rows),
    )
    notes = "\n".join(f"- {_named(r)}: {plain(compare.how(r, common=common))}" for r in rows)
    return "\n\n".join(part for part in (listed, common[0], notes) if part)


def _named(row: compare.Row) -> str:
    return plain(row.label) + (f" in {code(row.where)}" if row.where else "")


def _cell(cell: compare.Cell | None) -> str:
    return "" if cell is None else plain(f"{cell.text} {cell.unit}".strip())


def _interval(row: compare.Row) -> str:
    cell = row.compressed or row.original
    return plain(cell.interval) if cell else ""


def _protocol(record: RunRecord) -> str:
    lines = [f"- {plain(line)}" for line in record.protocol]
    lines += [
        f"- {plain(t.role)}: {plain(t.name)}, {_share(t.share)}{t.pieces}, SHA-256 {code(t.sha256)}"
        for t in record.texts
    ]
    lines.append(f"- recipe: `recipe.yaml`, SHA-256 {code(record.recipe_sha256)}, seed {record.seed}")
    return "## Protocol\n\n" + "\n".join(lines)


def _share(share: float) -> str:
    return "" if share == 1 else f"share {share:.4g}, "


def _limits(record: RunRecord) -> str:
    lines = [
        "- Quality was measured on the text named above, in its language; other uses may lose more.",
        "- Speed was measured on one machine and differs on another.",
        "- What the original gets wrong, and its biases, are kept.",
    ]
    if dense := compare.in_transformers(record):
        lines.insert(2, f"- {dense}")
    if record.origin.dequantized_from:
        source = plain(record.origin.dequantized_from)
        lines.insert(
            0, f"- The original is itself a quantized release ({source}): all figures are relative to it."
        )
    lines += [f"- {plain(f.message)}{f' ({plain(f.where)})' if f.where else ''}" for f in record.all_findings]
    return "## Limits and findings\n\n" + "\n".join(lines)


def _shell(path: str) -> str:
    """The path as one word of a shell line that cannot end its code block."""
    return shlex.quote(_line(path).replace("```", "'''"))
