"""llama.cpp in this process: right answers, silence, clear refusals."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from pocketsize.errors import DataError, ResourceError, UnsupportedError, UsageError
from pocketsize.exporting.gguf.writer import write
from pocketsize.io import llamacpp
from pocketsize.io.llamacpp import LlamaCpp, installed
from pocketsize.models.load import load
from pocketsize.models.skeleton import materialise
from tiny import write_tiny

IDS = [5, 60, 7, 100, 9, 33, 150]
here = [name for name, module in llamacpp.PACKAGES.items() if importlib.util.find_spec(module)]
runs = pytest.mark.skipif(not here, reason="llama.cpp is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model and its float GGUF."""
    folder = tmp_path_factory.mktemp("gguf")
    model = load(write_tiny(folder / "tiny", "llama"))
    write(replace(model, dtype=torch.float32), folder / "tiny.gguf")
    return model, folder / "tiny.gguf"


@runs
@pytest.mark.parametrize("package", here)
def test_probabilities_are_those_of_torch(made, package):
    model, path = made
    with torch.no_grad():
        expected = materialise(model)(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)
    with LlamaCpp(path, threads=1, context=256, exact=True, package=package) as runtime:
        found = runtime.top(IDS, 8)
        assert runtime.top(IDS[:3], 1) == runtime.top(IDS[:3], 1)
        again = runtime.top(IDS, 8)
        assert [token for token, _ in again] == [token for token, _ in found]
    assert [token for token, _ in found] == expected.topk(8).indices.tolist()
    assert [p for _, p in found] == pytest.approx(expected.topk(8).values.tolist(), abs=1e-3)
    assert all(math.isfinite(p) and p < 0 for _, p in found)


@runs
@pytest.mark.parametrize("package", here)
def test_greedy_text_chat_and_timings(made, package):
    model, path = made
    module, ids = materialise(model), list(IDS)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(module(torch.tensor([ids])).logits[0, -1].argmax()))
    with LlamaCpp(path, threads=1, context=256, exact=True, package=package) as runtime:
        assert runtime.greedy(IDS, 12) == ids[len(IDS) :]
        assert isinstance(runtime.chat([{"role": "user", "content": "Hello"}], 8), str)
        timings = runtime.timings(IDS, 6)
    assert (timings.prompt_tokens, timings.decoded_tokens) == (len(IDS), 6)
    assert timings.prompt_per_s > 0 and timings.decode_per_s > 0


@runs
def test_text_and_control_tokens(made):
    with LlamaCpp(made[1], threads=1, context=64) as runtime:
        plain = runtime.tokenize("<|im_end|>")
        assert 2 not in plain and len(plain) > 1
        assert runtime.tokenize("<|im_end|>", special=True) == [2]


@runs
@pytest.mark.parametrize("package", here)
def test_the_size_of_a_chat_is_known_before_it_is_asked(made, package):
    with LlamaCpp(made[1], threads=1, context=256, package=package) as runtime:
        short, long = ([{"role": "user", "content": "fox " * n}] for n in (4, 400))
        assert runtime.context == 256
        assert 4 < runtime.chat_tokens(short) < 256 < runtime.chat_tokens(long)
        if package == "xllamacpp":
            rendered = f"<|im_start|>user\n{short[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
            assert runtime.chat_tokens(short) == len(runtime.tokenize(rendered, special=True))
        with pytest.raises(DataError, match=r"llama\.cpp refuses"):
            runtime.chat(long, 8)


@pytest.mark.skipif("xllamacpp" not in here, reason="xllamacpp is not installed")
def test_a_context_is_never_more_than_the_model_has(made):
    with LlamaCpp(made[1], threads=1, package="xllamacpp") as runtime:
        assert runtime.context == made[0].config.max_position_embeddings < 2048


@runs
def test_nothing_is_printed_and_no_port_stays(made, source_env):
    script = (
        "import sys; from pocketsize.io.llamacpp import LlamaCpp, DataError\n"
        "r = LlamaCpp(sys.argv[1], threads=1, context=64); r.top([5, 6]); r.tokenize('a'); r.close()\n"
        "try: LlamaCpp(sys.argv[2], threads=1)\n"
        "except DataError: pass"
    )
    bad = made[1].with_name("bad.gguf")
    bad.write_bytes(b"GGUF" + bytes(64))
    command = [sys.executable, "-c", script, str(made[1]), str(bad)]
    done = subprocess.run(command, capture_output=True, env=source_env, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@runs
@pytest.mark.parametrize("package", here)
def test_what_cannot_be_asked(made, tmp_path, package):
    with pytest.raises(DataError, match="no such GGUF file"):
        LlamaCpp(tmp_path / "none.gguf", threads=1, package=package)
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"bad\.gguf: llama\.cpp cannot load it"):
        LlamaCpp(tmp_path / "bad.gguf", threads=1, package=package)
    with pytest.raises(UsageError, match="threads and context must be positive"):
        LlamaCpp(made[1], threads=0, package=package)


def test_a_missing_package_names_the_extra(made, monkeypatch):
    monkeypatch.setattr(llamacpp.importlib.util, "find_spec", lambda _: None)
    assert installed() is None
    with pytest.raises(UnsupportedError, match=r"pocketsize\[llamacpp\]"):
        LlamaCpp(made[1], threads=1)


def test_a_package_that_does_not_import_is_named_with_the_way_out(monkeypatch, tmp_path):
    (tmp_path / "broken_llama.py").write_text("raise ImportError('no libfoo')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(llamacpp, "PACKAGES", {"xllamacpp": "broken_llama"})
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ResourceError, match=r"no libfoo.*--force-reinstall xllamacpp"):
        LlamaCpp(tmp_path / "m.gguf", threads=1, context=64)


@runs
@pytest.mark.parametrize("package", here)
def test_a_cache_that_heads_do_not_fit_is_named(made, package):
    with pytest.raises(DataError, match="with a cache of q8_0 and q8_0, for which heads"):
        LlamaCpp(made[1], threads=1, context=64, cache=("q8_0", "q8_0"), package=package)
