"""Timings: the right rows, the threads put back, rates that follow from the times."""

from __future__ import annotations

import pytest
import torch

from pocketsize.io.llamacpp import Timings
from pocketsize.measurement import latency, runtime
from pocketsize.measurement.latency import torch_latency
from pocketsize.measurement.runtime import llamacpp_latency
from pocketsize.models.load import load
from tiny import write_tiny


def test_generators_are_timed_and_threads_put_back(tmp_path):
    model = load(write_tiny(tmp_path, "llama"))
    before = torch.get_num_threads()
    rows = torch_latency(model, "original", threads=1, prompt=16, tokens=8)
    assert torch.get_num_threads() == before
    assert [row.name for row in rows] == ["prompt_rate", "prompt_p99", "decode_rate", "decode_p99"]
    assert all(row.value > 0 and "1 threads" in row.method and "load" in row.method for row in rows)
    assert rows[1].value >= 1e3 / rows[2].value


def test_encoders_are_timed_by_input_and_by_sentence(tmp_path):
    rows = torch_latency(load(write_tiny(tmp_path, "bert")), "original", threads=1)
    assert [(row.name, row.better) for row in rows] == [("input_time", "lower"), ("sentence_rate", "higher")]


def test_rates_are_medians_of_the_times(monkeypatch, tmp_path):
    clock = iter(float(t) for pair in ((i * 10, i * 10 + i) for i in range(1, 6)) for t in pair)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    assert latency._timed(lambda: None, 5) == [1, 2, 3, 4, 5]
    assert latency._median([1, 2, 3, 4, 50]) == 3


class Engine:
    """Stands in for llama.cpp: the first run is slow, the others differ a little."""

    package = "fake"

    def __init__(self, path, *, threads, context):
        self.runs, self.context = 0, context

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def tokenize(self, text):
        return [5, 6, 7]

    def timings(self, ids, n):
        assert len(ids) == 256 and len(ids) + n <= self.context
        self.runs += 1
        return Timings(len(ids), n, 1000.0, 1.0 if self.runs == 1 else 100.0 + self.runs)


def test_llamacpp_rows_leave_the_first_run_out(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "LlamaCpp", Engine)
    rows = {row.name: row for row in llamacpp_latency(tmp_path / "a.gguf", "a.gguf", threads=2)}
    assert rows["prompt_rate"].value == 1000
    assert rows["decode_rate"].value == pytest.approx(106.5)
    assert 1e3 / 103 < rows["decode_p99"].value < 1e3 / 102
    assert "2 threads" in rows["decode_rate"].method and rows["decode_rate"].samples == 10
