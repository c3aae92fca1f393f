"""Rows of a matrix are independent: run a compiled loop over them on all of torch's threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def over_rows(rows: int, work: Callable[[int, int], None]) -> None:
    """Call `work(a, b)` on ranges that cover 0 .. rows, one range per torch thread.

    `work` must release the GIL to gain anything, and must touch rows a .. b only: the result is
    then the same for any number of threads.
    """
    threads = min(torch.get_num_threads(), rows)
    if threads <= 1:
        work(0, rows)
        return
    edges = [rows * t // threads for t in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, a, b) for a, b in itertools.pairwise(edges)]:
            done.result()
