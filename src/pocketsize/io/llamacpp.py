"""llama.cpp, in this process: loads a GGUF and answers with tokens, log-probabilities and timings.

Two packages bring llama.cpp to Python, `xllamacpp` (prebuilt) and `llama-cpp-python` (built on
install); whichever is there is used, the first where both are. Nothing is printed. xllamacpp
runs llama.cpp's server and insists on a port: it listens on loopback only, behind a random key.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from gguf import GGMLQuantizationType

from pocketsize.errors import DataError, ResourceError, UnsupportedError, UsageError

_FORCED = 1e6
# Keys and values as they are; attention is then computed plainly.
PLAIN = ("f32", "f32")
PACKAGES = {"xllamacpp": "xllamacpp", "llama-cpp-python": "llama_cpp"}


@dataclass(frozen=True, slots=True)
class Timings:
    """Speed of one prompt and the tokens decoded after it, batch 1."""

    prompt_tokens: int
    decoded_tokens: int
    prompt_per_s: float
    decode_per_s: float


class _Engine(Protocol):
    def top(self, ids: list[int], n: int) -> list[tuple[int, float]]: ...
    def chat(self, messages: list[dict[str, str]], max_tokens: int) -> str: ...
    def chat_tokens(self, messages: list[dict[str, str]]) -> int: ...
    def context(self) -> int: ...
    def tokenize(self, text: str, special: bool) -> list[int]: ...
    def timings(self, ids: list[int], n: int) -> Timings: ...
    def close(self) -> None: ...


def installed() -> str | None:
    """The package that brings llama.cpp here, or None."""
    return next((name for name, module in PACKAGES.items() if importlib.util.find_spec(module)), None)


class LlamaCpp:
    """A GGUF file loaded in llama.cpp on the CPU.

    `exact` keeps keys and values in float32 and computes attention plainly, so that what a file
    holds can be compared with a float32 forward; the default is llama.cpp's own (float16 keys
    and values); `cache` names other types for keys and for values. `package` forces one of `PACKAGES`.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        threads: int,
        context: int = 2048,
        exact: bool = False,
        cache: tuple[str, str] | None = None,
        package: str | None = None,
    ) -> None:
        if exact:
            cache = PLAIN
        name = package or installed()
        if name is None or name not in PACKAGES or not importlib.util.find_spec(PACKAGES[name]):
            raise UnsupportedError(
                f"{name or 'llama.cpp'} is not installed; python -m pip install 'pocketsize[llamacpp]'"
            )
        if threads < 1 or context < 1:
            raise UsageError(f"threads and context must be positive, got {threads} and {context}")
        if not Path(path).is_file():
            raise DataError(f"{path}: no such GGUF file")
        self.package = name
        make = _Xllamacpp if name == "xllamacpp" else _LlamaCppPython
        self._engine: _Engine = make(str(path), threads, context, cache)

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer have room for: never more than the model has."""
        return self._engine.context()

    def top(self, ids: Sequence[int], n: int = 1) -> list[tuple[int, float]]:
        """The `n` likeliest next tokens after `ids`, with log-probabilities in nats, best first."""
        return self._engine.top(list(ids), n)

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The next `n` tokens when the likeliest is always taken, stop tokens like any other."""
        out: list[int] = []
        for _ in range(n):
            out.append(self.top([*ids, *out])[0][0])
        return out

    def chat(self, messages: Sequence[Mapping[str, str]], max_tokens: int = 128) -> str:
        """The model's greedy answer, rendered with the chat template in the file."""
        return self._engine.chat([dict(m) for m in messages], max_tokens)

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        """How much of `context` the messages take, rendered with the chat template in the file."""
        return self._engine.chat_tokens([dict(m) for m in messages])

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """The token ids of a text by the tokenizer in the file; `special` reads control tokens in it."""
        return self._engine.tokenize(text, special)

    def timings(self, ids: Sequence[int], n: int) -> Timings:
        """How fast the prompt `ids` is read and `n` tokens after it are decoded."""
        return self._engine.timings(list(ids), n)

    def close(self) -> None:
        """Free the model; nothing can be asked afterwards."""
        self._engine.close()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unloadable(path: str, cache: tuple[str, str] | None) -> str:
    said = f"{path}: llama.cpp cannot load it"
    if cache is None or cache == PLAIN:
        return said
    return f"{said} with a cache of {' and '.join(cache)}, for which heads hold whole blocks of 32"


def _imported(name: str) -> Any:
    """The module of a package that is installed; one that does not import is a ResourceError."""
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError as error:
        way = f"python -m pip install --force-reinstall {name}"
        raise ResourceError(f"{name} is installed but does not import ({error}); {way}") from error


class _Xllamacpp:
    """llama.cpp's server, asked through its handlers; what has no handler goes over the socket."""

    def __init__(self, path: str, threads: int, context: int, cache: tuple[str, str] | None) -> None:
        xllamacpp = _imported("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity, params.warmup, params.ui, params.offline = -1, False, False, True
        params.cache_ram_mib, params.n_threads_http = 0, 1
        params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = False
        params.hostnames, params.port = ["127.0.0.1"], 0
        self._key = secrets.token_hex(32)
        params.api_keys = [self._key]
        if cache is not None:
            types = (f"GGML_TYPE_{kind.upper()}" for kind in cache)
            params.cache_type_k, params.cache_type_v = (getattr(xllamacpp.ggml_type, t) for t in types)
            word = "DISABLED" if cache == PLAIN else "ENABLED"
            params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{word}")
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise DataError(_unloadable(path, cache)) from error
        self._path, self._begun = path, False
        self._bias = [[self.tokenize("a", False)[0], _FORCED]]

    def top(self, ids: list[int], n: int) -> list[tuple[int, float]]:
        # Stop tokens, and tokens that end within a character, come back without probabilities. The
        # probabilities are those of the logits before any sampler, so a bias can have a harmless
        # token sampled in their place.
        reply = self._complete(ids, 1, n_probs=max(n, 1), cache_prompt=True, logit_bias=self._bias)
        first = reply["choices"][0]["logprobs"]["content"][0]
        return [(t["id"], t["logprob"]) for t in first["top_logprobs"]]

    def chat(self, messages: list[dict[str, str]], max_tokens: int) -> str:
        reply = self._server.handle_chat_completions(
            {"messages": messages, "max_tokens": max_tokens, "temperature": 0.0, "cache_prompt": False}
        )
        self._begun = True
        return self._sound(reply)["choices"][0]["message"]["content"]

    def chat_tokens(self, messages: list[dict[str, str]]) -> int:
        return len(self.tokenize(self._asked("apply-template", "prompt", body={"messages": messages}), True))

    def context(self) -> int:
        return self._asked("props", "default_generation_settings", "n_ctx")

    def tokenize(self, text: str, special: bool) -> list[int]:
        body = {"content": text, "add_special": special, "parse_special": special}
        return self._asked("tokenize", "tokens", body=body)

    def timings(self, ids: list[int], n: int) -> Timings:
        t = self._complete(ids, n, cache_prompt=False, ignore_eos=True)["timings"]
        return Timings(t["prompt_n"], t["predicted_n"], t["prompt_per_second"], t["predicted_per_second"])

    def close(self) -> None:
        # A server that is told to end before its loop began never ends: on a busy machine the loop may begin
        # later than the first answers that need none. One token is sure to come from the loop.
        if self._server is not None and not self._begun:
            self._complete([0], 1)
        self._server = None

    def _asked(self, path: str, *keys: str, body: dict[str, object] | None = None) -> Any:
        """What the server answers over its socket, under these keys."""
        request = urllib.request.Request(
            f"{self._server.listening_address}/{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        # No proxy: the address is this machine's.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as reply:
                answer = json.load(reply)
            for key in keys:
                answer = answer[key]
            return answer
        except (urllib.error.URLError, ValueError, KeyError) as error:
            raise DataError(f"{self._path}: llama.cpp cannot {path}: {error}") from error

    def _complete(self, ids: list[int], n: int, **options: object) -> dict[str, Any]:
        request = {"prompt": ids, "n_predict": n, "temperature": 0.0, "top_k": 1, **options}
        reply = self._server.handle_completions(request)
        self._begun = True
        return self._sound(reply)

    def _sound(self, reply: dict[str, Any]) -> dict[str, Any]:
        if "error" in reply:
            raise DataError(
                f"{self._path}: llama.cpp refuses: {reply['error'].get('message', reply['error'])}"
            )
        return reply


class _LlamaCppPython:
    """The `llama_cpp` bindings; prompts that continue the last one reuse its keys and values."""

    def __init__(self, path: str, threads: int, context: int, cache: tuple[str, str] | None) -> None:
        llama_cpp = _imported("llama-cpp-python")
        types = cache or ("f16", "f16")
        kinds = [GGMLQuantizationType[kind.upper()].value for kind in types]
        try:
            self._llama: Any = llama_cpp.Llama(
                path,
                n_ctx=context,
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=0,
                type_k=kinds[0],
                type_v=kinds[1],
                flash_attn=types != PLAIN,
                verbose=False,
            )
        except ValueError as error:
            raise DataError(_unloadable(path, cache)) from error
        self._path = path

    def top(self, ids: list[int], n: int) -> list[tuple[int, float]]:
        logits = self._logits(ids).astype("float64")
        peak = logits.max()
        total = peak + math.log(float(np.exp(logits - peak).sum()))
        best = np.argsort(-logits, kind="stable")[: max(n, 1)]
        return [(int(i), float(logits[i] - total)) for i in best]

    def chat(self, messages: list[dict[str, str]], max_tokens: int) -> str:
        try:
            reply = self._llama.create_chat_completion(
                messages=messages, max_tokens=max_tokens, temperature=0.0
            )
        except ValueError as error:
            raise DataError(f"{self._path}: llama.cpp refuses: {error}") from error
        return reply["choices"][0]["message"]["content"]

    def chat_tokens(self, messages: list[dict[str, str]]) -> int:
        # The bindings do not say how they render a chat: a message's role and marks count as 16 tokens.
        return sum(len(self.tokenize(m["content"], False)) + 16 for m in messages)

    def context(self) -> int:
        return self._llama.n_ctx()

    def tokenize(self, text: str, special: bool) -> list[int]:
        return self._llama.tokenize(text.encode(), add_bos=special, special=special)

    def timings(self, ids: list[int], n: int) -> Timings:
        self._llama.reset()
        start = perf_counter()
        token = int(self._logits(ids).argmax())
        middle = perf_counter()
        for _ in range(n - 1):
            ids = [*ids, token]
            token = int(self._logits(ids).argmax())
        end = perf_counter()
        return Timings(
            len(ids) - n + 1, n, (len(ids) - n + 1) / (middle - start), (n - 1) / max(end - middle, 1e-9)
        )

    def close(self) -> None:
        self._llama.close()

    def _logits(self, ids: list[int]) -> Any:
        """Logits after `ids`; only what the last call did not see is computed."""
        llama_cpp = _imported("llama-cpp-python")
        seen = self._llama.input_ids[: self._llama.n_tokens].tolist()
        same = next(
            (i for i, (a, b) in enumerate(zip(seen, ids, strict=False)) if a != b), min(len(seen), len(ids))
        )
        self._llama.n_tokens = min(same, len(ids) - 1)
        self._llama.eval(ids[self._llama.n_tokens :])
        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._llama.n_vocab(),)).copy()
