"""The contestants of this benchmark: who prunes how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from contest import Side

MODELS: Mapping[str, str] = {"smollm2-135m": "generate", "mpnet-base": "embed"}
PATTERNS = ("unstructured", "2:4")
OURS, PEERS = "pocketsize", ("sparsegpt", "wanda")
_PEER = ("llmcompressor==0.14.0.1",)
_DENSE = {"scheme": "W3A16", "group": 64, "symmetric": False, "embeddings": None}


def stem(pattern: str) -> str:
    """A pattern as it stands in file names."""
    return pattern.replace(":", "of")


def ours(name: str, *steps: Mapping[str, Any]) -> Side:
    """Steps of ours."""
    return Side(name, "side_pruning_ours.py", environment={"STEPS": json.dumps(steps)})


def peer(method: str, pattern: str) -> Side:
    """A method of llm-compressor."""
    known = {"METHOD": method, "PATTERN": pattern}
    return Side(
        f"{method}-{stem(pattern)}", "side_pruning_llmcompressor.py", _PEER, known, tool="llmcompressor"
    )


CONTEST = tuple(
    side
    for pattern in PATTERNS
    for side in (
        *(peer(method, pattern) for method in PEERS),
        ours(f"{OURS}-{stem(pattern)}", {"prune": {"pattern": pattern}}),
    )
)
# What stages and choices of ours give, and pruned codes beside dense ones.
JOINT, DENSE = "pruned-4bit", "dense-3bit"
VARIANTS = (
    ours("magnitude", {"prune": {"score": "magnitude"}}),
    ours("learned", {"prune": {"learn": 20}}),
    ours("oats", {"oats": {"sparsity": 0.5}}),
    ours(JOINT, {"prune": {}}, {"gptq": _DENSE | {"scheme": "W4A16"}}),
    ours(DENSE, {"gptq": _DENSE}),
)
SIDES = (*CONTEST, *VARIANTS)
TASKS: Mapping[str, tuple[str, ...]] = {side.name: ("generate", "embed") for side in CONTEST} | {
    side.name: ("generate",) for side in VARIANTS
}
