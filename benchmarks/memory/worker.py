"""Quantize a folder, and write down what it took: `worker.py FOLDER RESULT SEQUENCES LENGTH`."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from meter import cpu_seconds, write_json
from whole import quantize

from pocketsize.recipes.quantize import Gptq


def main() -> None:
    folder, result, (sequences, length) = Path(sys.argv[1]), Path(sys.argv[2]), map(int, sys.argv[3:])
    watch = Watch()
    watch.start()
    start = cpu_seconds(), time.perf_counter()
    report = quantize(folder, Gptq("W4A16", group=64, embeddings=None), sequences, length)
    cost = {"cpu_s": round(cpu_seconds() - start[0], 1), "wall_s": round(time.perf_counter() - start[1], 1)}
    blocks = len({layer.name.split(".")[2] for layer in report.layers})
    write_json(result, {"blocks": blocks, "peak_anonymous_bytes": watch.stop(), **cost})


class Watch(threading.Thread):
    """The most anonymous memory that this process has resident, looked at every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.over = threading.Event()

    def run(self) -> None:
        """Look until told to stop."""
        while not self.over.wait(0.02):
            self.most = max(self.most, anonymous_bytes())

    def stop(self) -> int:
        """The most that was seen."""
        self.over.set()
        self.join()
        return max(self.most, anonymous_bytes())


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon; this benchmark needs Linux")


if __name__ == "__main__":
    main()
