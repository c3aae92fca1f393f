"""Chats as text: the model's own template, rendered in a process that has little time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pocketsize.errors import DataError, RefusedError, ResourceError, UnsupportedError

# Names of rows, and their messages.
Chats = Sequence[tuple[str, Sequence[Mapping[str, object]]]]
Render = Callable[[Chats], list[str]]

TEMPLATE_BYTES = 1 << 16
ROW_SECONDS, ROW_BYTES, MEMORY_BYTES = 2, 1 << 20, 256 << 20
_START_SECONDS = 60
# A template is a program from a file: the sandbox keeps it from objects and files, not from endless
# loops or huge texts. A timer ends a row, a limit of memory ends a text.
_SCRIPT = """
import json, resource, signal, sys
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

template, special, seconds, size, memory = json.loads(sys.stdin.readline())

def late(*_):
    raise TimeoutError(f"takes more than {seconds} s")

signal.signal(signal.SIGVTALRM, late)
try:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
except (OSError, ValueError):
    pass

def rendered(chat):
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        text = render_jinja_template([chat], chat_template=template, **special)[0][0]
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        return ["refused", f"gives {len(text)} characters"] if len(text) > size else ["text", text]
    except SecurityError as error:
        return ["refused", str(error)]
    except TemplateSyntaxError as error:
        return ["wrong", f"line {error.lineno}: {error}"]
    except MemoryError:
        return ["refused", "takes too much memory"]
    except TimeoutError as error:
        return ["refused", str(error)]
    except Exception as error:
        return ["wrong", f"{type(error).__name__}: {error}"]

print("ready", flush=True)
for line in sys.stdin:
    answer = rendered(json.loads(line))
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    print(json.dumps(answer), flush=True)
    if answer[0] != "text":
        break
"""


def chat_renderer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Render:
    """What turns chats into the text that the tokenizer in `folder` has a template for."""

    def render(chats: Chats) -> list[str]:
        template = _template(tokenizer, folder, chats[0][0])
        texts: list[str] = []
        for (name, _), answer in zip(chats, _answers(tokenizer, template, chats), strict=False):
            word, said = answer
            if word == "text" and said.strip():
                texts.append(said)
                continue
            said = " ".join(said.split())[:200] or "gives no text"
            if word == "refused":
                raise RefusedError(f"{name}: the chat template of {folder} {said}; it is not used")
            raise DataError(f"{name}: the chat template of {folder} cannot render it: {said}")
        if len(texts) < len(chats):
            name = chats[len(texts)][0]
            raise RefusedError(f"{name}: the chat template of {folder} ends the process; it is not used")
        return texts

    return render


def _template(tokenizer: PreTrainedTokenizerBase, folder: Path, name: str) -> str:
    if not tokenizer.chat_template:
        raise UnsupportedError(
            f"{name}: a chat, and the tokenizer in {folder} has no chat template; give rows with text, "
            "or a chat model"
        )
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise UnsupportedError(f"{folder}: {' '.join(str(error).split())[:200]}") from error
    if (size := len(template.encode())) > TEMPLATE_BYTES:
        raise RefusedError(
            f"{folder}: a chat template of {size} bytes; at most {TEMPLATE_BYTES} are a template"
        )
    return template


def _answers(tokenizer: PreTrainedTokenizerBase, template: str, chats: Chats) -> list[tuple[str, str]]:
    """What the child says of each chat, up to the first that it cannot render."""
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    options = json.dumps([template, special, ROW_SECONDS, ROW_BYTES, MEMORY_BYTES])
    lines = "".join(json.dumps(list(messages)) + "\n" for _, messages in chats)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT],
            input=options + "\n" + lines,
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=environment,
            timeout=_START_SECONDS + ROW_SECONDS * len(chats),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return []
    ready, *found = done.stdout.splitlines() or [""]
    if ready != "ready":
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ResourceError(f"the process that renders chats does not start: {reason[:200]}")
    return [(word, said) for word, said in (json.loads(line) for line in found)]
