"""The texts that encoders are calibrated and scored on: those of `peers-encoder`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parents[1] / "peers-encoder" / "run.py"
_SPEC = importlib.util.spec_from_file_location("peers_encoder", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
_RUN = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_RUN)

tokens, score = _RUN.texts, _RUN.score
