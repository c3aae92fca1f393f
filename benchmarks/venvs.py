"""Virtual environments for the peers, so that their pins never meet ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TORCH = "torch==2.13.0"
UNFINISHED = "unfinished-constraints.txt"


def python_of(folder: Path, requirements: Sequence[str]) -> Path:
    """The interpreter of the environment `folder`, which is made first if it is not there.

    torch is installed first and held, so that no peer pulls another version than ours.
    """
    python = folder / "bin" / "python"
    if python.exists() and not (folder / UNFINISHED).exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    constraints = folder / UNFINISHED
    constraints.write_text(TORCH + "\n")
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, "--constraint", str(constraints), *requirements], check=True)
    constraints.unlink()
    return python
