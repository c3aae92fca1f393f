"""Every recipe key and every command-line option, against a list: adding one is a visible change."""

from __future__ import annotations

import importlib
from dataclasses import fields

import click

from pocketsize.cli.main import WORDS
from pocketsize.data.sources import Source
from pocketsize.recipes.recipe import KEYS as RECIPE
from pocketsize.recipes.recipe import Data
from pocketsize.recipes.table import STEPS

QUANTIZE = [
    *("scheme", "group", "symmetric", "float_zeros"),
    *("embeddings", "embeddings_symmetric", "scale_digits", "overrides"),
]
TRAINING = [
    *("tokens", "epochs", "minutes", "batch", "length", "accumulate"),
    *("rate", "warmup", "decay", "clip", "average", "patience", "recompute", "precision"),
    *("dropout", "sharded"),
]
DISTILL = [
    *TRAINING,
    *("lora", "alpha"),
    *("teacher", "weigh", "shares", "signals", "kept", "cache"),
    *("on_policy", "replay", "written", "written_tokens"),
    *("exits", "early"),
    *("loss", "temperature", "mix", "soft", "hard"),
    *("hidden", "cosine", "attention", "relations", "heads", "pairs"),
    *("progressive", "generations"),
]
KEYS = {
    "data": [
        "calibrate",
        "evaluate",
        "sequences",
        "length",
        "tokens",
        "seed",
        "written",
        "train",
        "shortest",
    ],
    "source": ["files", "share", "column", "rows", "label", "pair"],
    "layers": ["keep", "pick", "remove", "heal"],
    "student": [
        *("family", "heads", "kv_heads", "ffn", "hidden", "layers", "vocabulary", "tied"),
        *("parameters", "megabytes", "latency_ms", "embedding", "window", "norm", "start"),
        *("remove", "importance", "heal"),
    ],
    "prune": [
        *("sparsity", "pattern", "score", "update", "scope", "allocation", "spread"),
        *("damp", "rounds", "alpha", "sink", "learn", "overrides"),
    ],
    "rotate": ["values", "residual", "seed"],
    "oats": ["sparsity", "pattern", "rank", "rounds", "damp", "alpha", "sink"],
    "distill": DISTILL,
    "gradual": [
        *DISTILL,
        *("sparsity", "pattern", "method", "scope", "begin", "end", "every", "cycles", "rewind"),
        *("fraction", "score_rate", "scores", "threshold", "penalty"),
    ],
    "finetune": [*TRAINING, "lora", "alpha", "exits", "early", "classes"],
    "gate": ["skip", "save", "agree", "score", "spread", "head", "tokens", "confidence", "exits", "rank"],
    "rtn": QUANTIZE,
    "awq": [*QUANTIZE, "exponents"],
    "smoothquant": [*QUANTIZE, "exponents"],
    "hqq": [*QUANTIZE, "p", "iterations"],
    "gptq": [*QUANTIZE, "damp", "order", "search", "sink", "learn", "alpha", "beta"],
    "qat": [
        *TRAINING,
        *QUANTIZE,
        "start",
        "damp",
        "alpha",
        "learn",
        "codes",
        "scales",
        "loss",
        "temperature",
        "mix",
    ],
}
TEXTS = {"--calibrate", "--evaluate", "--sequences", "--length", "--tokens", "--seed", "--written"}
SCHEME = {
    *("--method", "--scheme", "--group", "--symmetric", "--asymmetric", "--float-zeros", "--integer-zeros"),
    *("--embeddings", "--damp", "--override", "--effort", "--tune", "--rotate"),
}
GOAL = {"--keep", "--fit", "--ratio"}
WRITES = {"--output", "--overwrite"}
OPTIONS = {
    "shrink": {
        *GOAL,
        "--mixed",
        "--uniform",
        "--effort",
        "--tune",
        "--target",
        *WRITES,
        "--dtype",
        "--threads",
        "--fetch",
        "--json",
        *TEXTS,
    },
    "run": {*WRITES, "--threads", "--fetch", "--json"},
    "quantize": {*SCHEME, "--target", *WRITES, "--dtype", "--threads", "--fetch", "--json", *TEXTS},
    "distill": {
        *("--layers", "--pick", "--budget", "--loss", "--teacher", "--set", "--train"),
        *("--target", *WRITES, "--dtype", "--threads", "--fetch", "--json", *TEXTS),
    },
    "prune": {
        *(
            "--sparsity",
            "--pattern",
            "--score",
            "--remove",
            "--by",
            "--recover",
            "--scheme",
            "--set",
            "--train",
        ),
        *("--target", *WRITES, "--dtype", "--threads", "--fetch", "--json", *TEXTS),
    },
    "finetune": {
        *("--budget", "--set", "--train"),
        *("--target", *WRITES, "--dtype", "--threads", "--fetch", "--json", *TEXTS),
    },
    "plan": {
        *SCHEME,
        *GOAL,
        "--curve",
        "--target",
        "--output",
        "--dtype",
        "--threads",
        "--fetch",
        "--json",
        *TEXTS,
    },
    "inspect": {"--fetch", "--json"},
    "measure": {"--against", "--data", "--tokens", "--cache", "--context", "--threads", "--fetch", "--json"},
    "verify": {"--json", "--llamacpp", "--no-llamacpp"},
    "report": {"--output", "--json"},
    "chat": {"--prompt", "--tokens", "--cache", "--threads"},
    "doctor": {"--output", "--json"},
    "fetch": {"--revision", "--file", "--json"},
}


def test_recipe_keys() -> None:
    assert RECIPE == ("model", "data", "steps", "export", "dtype")
    assert [f.name for f in fields(Data)] == KEYS["data"]
    assert [f.name for f in fields(Source)] == KEYS["source"]
    assert {kind: [f.name for f in fields(step)] for kind, step in STEPS.items()} == {  # type: ignore[arg-type]
        kind: keys for kind, keys in KEYS.items() if kind not in ("data", "source")
    }


def test_command_line_options() -> None:
    assert set(OPTIONS) == set(WORDS)
    for word in WORDS:
        command = importlib.import_module(f"pocketsize.cli.{word}").command
        options = {
            name
            for p in command.params
            if isinstance(p, click.Option)
            for name in (*p.opts, *p.secondary_opts)
            if name.startswith("--")
        }
        assert options == OPTIONS[word], word
