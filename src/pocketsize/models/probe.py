"""A tokenizer of unknown origin is first opened where it can do no harm: in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pocketsize.errors import DataError, ResourceError

CPU_SECONDS, MEMORY_BYTES = 30, 4 << 30
# The parser is native code: damage makes it panic (a trace on the terminal, and no Exception), end
# the process, or run on.
_SCRIPT = """
import resource, sys
from tokenizers import Tokenizer
path, seconds, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for what, limit in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
    try:
        resource.setrlimit(what, (limit, limit))
    except (OSError, ValueError):
        pass
print("started", flush=True)
try:
    Tokenizer.from_file(path).encode("The quick brown fox, 42 times: \\u00e9\\u4e1c\\U0001f642")
except BaseException as error:
    print(" ".join(str(error).split())[:200])
    sys.exit(3)
"""


def probe_tokenizer(path: Path) -> None:
    """Refuses a tokenizer.json that the tokenizers library cannot open and use."""
    call = [sys.executable, "-c", _SCRIPT, str(path), str(CPU_SECONDS), str(MEMORY_BYTES)]
    try:
        done = subprocess.run(call, capture_output=True, timeout=4 * CPU_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{path}: the tokenizer does not load within {4 * CPU_SECONDS} s") from error
    if done.returncode == 0:
        return
    started, *said = done.stdout.decode(errors="replace").splitlines() or [""]
    if started != "started":
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
        raise ResourceError(f"a process for opening tokenizers does not start: {reason[0][:200]}")
    end = f"opening it ends the process ({done.returncode})"
    raise DataError(f"{path}: the tokenizer does not load: {said[0] if said else end}")
