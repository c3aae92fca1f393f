"""Quantize a folder, and write down what it took: `worker.py FOLDER RESULT SEQUENCES LENGTH`."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from meter import cpu_seconds, write_json

from pocketsize.exporting import compressed_tensors
from pocketsize.models.load import load
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.step import Context


def main() -> None:
    folder, result, (sequences, length) = Path(sys.argv[1]), Path(sys.argv[2]), map(int, sys.argv[3:])
    watch = Watch()
    watch.start()
    start = cpu_seconds(), time.perf_counter()
    blocks = quantize(folder, sequences, length)
    cost = {"cpu_s": round(cpu_seconds() - start[0], 1), "wall_s": round(time.perf_counter() - start[1], 1)}
    write_json(result, {"blocks": blocks, "peak_anonymous_bytes": watch.stop(), **cost})


def quantize(folder: Path, sequences: int, length: int) -> int:
    """The number of blocks that were walked; the quantized folder is written, then thrown away."""
    model = load(folder)
    step = Gptq("W4A16", group=64, embeddings=None).resolve(model, ("folder",))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(model.config.vocab_size), (sequences, length), generator=generator)
    walked: list[str] = []
    with tempfile.TemporaryDirectory(dir=folder.parent) as room:
        journal = open_journal(Path(room) / "work", {})
        context = Context(
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            journal,
            lambda done, total, what: walked.append(what),
        )
        done = step.apply(model, context)
        (Path(room) / "out").mkdir()
        compressed_tensors.write(done, Path(room) / "out")
    return len(walked)


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
