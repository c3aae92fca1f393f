"""What users can import: a change here is a visible change."""

from __future__ import annotations

import subprocess
import sys

import pocketsize

PUBLIC = [
    *(
        "Awq",
        "Data",
        "Distill",
        "Finetune",
        "Gate",
        "Gptq",
        "Gradual",
        "Hqq",
        "Layers",
        "Oats",
        "Plan",
        "Prune",
        "Qat",
        "Recipe",
        "Result",
        "Rotate",
        "Rtn",
        "SmoothQuant",
    ),
    *("Source", "Student", "__version__"),
    *(
        "distill",
        "finetune",
        "gated",
        "load",
        "plan",
        "prune",
        "quantize",
        "result",
        "run",
        "shrink",
        "verify",
    ),
]


def test_the_public_names_are_these_and_exist() -> None:
    assert sorted(pocketsize.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(pocketsize, name) is not None


def test_importing_prints_nothing_and_loads_no_torch(source_env: dict[str, str]) -> None:
    code = "import sys, pocketsize; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=source_env, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout == b"" and done.stderr == b""
