"""Who may use the network: `fetch` alone, and before other work only where `--fetch` asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType

import click

# Loaders read these when they are imported.
SEAL: Mapping[str, str] = MappingProxyType(
    {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "DO_NOT_TRACK": "1",
    }
)
# What the loaders take for yes; a user's own yes is left as it is, so that `fetch` sees it too.
_YES = ("1", "ON", "YES", "TRUE")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
# The names that were set here, so that a fetch in a process of its own can do without them.
OURS = "POCKETSIZESEALED"


def seal(*, keep_token: bool) -> None:
    """Tell every loader, here and in child processes, to stay offline; drop the user's hub token."""
    ours = [name for name in SEAL if os.environ.get(name, "").upper() not in _YES]
    if ours:
        os.environ.update({name: SEAL[name] for name in ours})
        os.environ[OURS] = ",".join(filter(None, [os.environ.get(OURS), *ours]))
    if not keep_token:
        _drop_token()


def fetch_first(wanted: bool, *models: str, json_: bool) -> None:
    """With `--fetch`, bring the models that are not on this machine yet, each in a process of its own."""
    from pocketsize.io.source import NotFetchedError, resolve

    if not wanted:
        return
    for model in models:
        try:
            resolve(model)
        except NotFetchedError as missing:
            _fetch(missing.what, json_=json_)
    _drop_token()


def _fetch(what: str, *, json_: bool) -> None:
    """Run `pocketsize fetch`; where it fails, end as it ended: it has said why."""
    call = [sys.executable, "-m", "pocketsize.cli.main", "fetch", what, "--json"]
    done = subprocess.run(call, env=unsealed(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        if json_:
            click.echo(done.stdout, nl=False)
        raise click.exceptions.Exit(done.returncode if done.returncode > 0 else 128 - done.returncode)


def unsealed() -> dict[str, str]:
    """The environment without what `seal` set, and without a token that was dropped."""
    ours = {*os.environ.get(OURS, "").split(","), OURS}
    return {name: value for name, value in os.environ.items() if name not in ours}


def _drop_token() -> None:
    for name in _TOKENS:
        os.environ.pop(name, None)
