"""Rows of a matrix are independent: run a loop over them on all of torch's threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# Rows that are worked on at once: enough for products to be quick, few enough for their errors to stay in a
# second-level cache. A fixed number, or results would depend on how many threads there are.
CHUNK = 256


def over_rows(rows: int, work: Callable[[int, int], None]) -> None:
    """Call `work(a, b)` on ranges of rows that cover 0 .. rows, as many at once as torch has threads.

    `work` must release the GIL to gain anything, and must touch rows a .. b only. Torch runs on one thread
    inside it, so that the result is the same for any number of threads, bit for bit.
    """
    threads = torch.get_num_threads()
    ranges = [(a, min(a + CHUNK, rows)) for a in range(0, rows, CHUNK)]
    if threads == 1:
        for a, b in ranges:
            work(a, b)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done in [pool.submit(work, a, b) for a, b in ranges]:
                done.result()
    finally:
        torch.set_num_threads(threads)  # of MKL there is one number for all threads
