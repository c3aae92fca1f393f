"""Questions to a hub: over TLS, with the user's token for that hub alone, and each fault in one line.

The connection is huggingface_hub's own, so that proxies, certificates, HF_ENDPOINT and HF_TOKEN mean
what they mean elsewhere. Its downloader is not used: that of 2.4 begins a file again that a killed
process left unfinished, and it may ask further hosts (xet).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import sleep
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.utils import get_session

from pocketsize import __version__
from pocketsize.errors import (
    DataError,
    IntegrityError,
    PocketsizeError,
    RefusedError,
    ResourceError,
    UsageError,
)
from pocketsize.io.hub.ids import PUBLIC, HubId

CONNECT_S, READ_S = 10.0, 30.0
# What a hub may ask us to wait; a longer wait is the user's to decide.
LONGEST_WAIT_S = 60
_REDIRECTS = 5
_LOCAL = ("127.0.0.1", "::1", "localhost")

T = TypeVar("T")


class PassingError(ResourceError):
    """A fault of the connection that may pass; `wait_s` is what the hub asked to wait."""

    def __init__(self, message: str, *, wait_s: int = 0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub, and the user's token, which is sent to no other host and never shown."""

    endpoint: str
    token: str | None = field(default=None, repr=False)

    @property
    def host(self) -> str:
        """The name by which messages call it."""
        return urlsplit(self.endpoint).netloc


def connect() -> Hub:
    """The hub that HF_ENDPOINT names, or huggingface.co, with the token of HF_TOKEN or `hf auth login`."""
    if constants.is_offline_mode():
        raise UsageError("HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nothing is fetched; unset it")
    endpoint = (os.environ.get("HF_ENDPOINT") or PUBLIC).rstrip("/")
    if not _is_safe(endpoint, local=True):
        raise RefusedError(f"HF_ENDPOINT is {endpoint!r}; models come over https:// alone")
    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return Hub(endpoint)
    try:
        return Hub(endpoint, get_token() or None)
    except Exception as error:  # what can go wrong with a login has many classes
        reason = type(error).__name__
        raise ResourceError(f"the token for {endpoint} cannot be had ({reason}); set HF_TOKEN") from None


def patiently(work: Callable[[], T], *, tries: int, so_far: Callable[[], int] = lambda: 0) -> T:
    """What `work` gives; while only the connection is at fault it is tried again, after longer and longer.

    It ends when `tries` in a row brought nothing: `so_far` tells how far the work has come.
    """
    failed, before = 0, so_far()
    while True:
        try:
            return work()
        except PassingError as error:
            failed = failed + 1 if so_far() == before else 1
            before = so_far()
            if failed >= tries or error.wait_s > LONGEST_WAIT_S:
                raise
            sleep(max(error.wait_s, 2 ** (failed - 1)))


@contextmanager
def answer(
    hub: Hub, url: str, asked: HubId, *, begin: int = 0, elsewhere: bool = False
) -> Iterator[httpx2.Response]:
    """The answer to a GET, from byte `begin` on, as a stream.

    Redirects within the hub are followed. Those to another host are followed only `elsewhere`, which
    is for contents that are checked by hash, and never with the token.
    """
    for _ in range(_REDIRECTS + 1):
        with _translated(hub, asked), _sent(hub, url, begin) as response:
            if not response.has_redirect_location:
                _require_good(hub, response, asked)
                yield response
                return
            target = urljoin(url, response.headers["Location"])
        if not _is_safe(target, local=urlsplit(hub.endpoint).hostname in _LOCAL):
            raise RefusedError(f"{asked}: {hub.host} points to {_shown(target)}, which is not https://")
        if not elsewhere and _origin(target) != _origin(hub.endpoint):
            raise RefusedError(
                f"{asked}: {hub.host} points to another host, {_shown(target)}; it is not asked, and gets no "
                "token; if you trust it, set HF_ENDPOINT to it"
            )
        url = target
    raise DataError(f"{asked}: {hub.host} points in circles, last to {_shown(url)}")


def read_answer(hub: Hub, url: str, asked: HubId, *, limit_bytes: int) -> bytes:
    """The whole body of a short answer."""
    with answer(hub, url, asked) as response:
        body = bytearray()
        for piece in response.iter_bytes():
            body += piece
            if len(body) > limit_bytes:
                raise DataError(f"{asked}: the answer of {hub.host} is longer than {limit_bytes} bytes")
    return bytes(body)


@contextmanager
def _sent(hub: Hub, url: str, begin: int) -> Iterator[httpx2.Response]:
    headers = {"user-agent": f"pocketsize/{__version__}", "accept-encoding": "identity"}
    if begin:
        headers["range"] = f"bytes={begin}-"
    if hub.token and _origin(url) == _origin(hub.endpoint):
        headers["authorization"] = f"Bearer {hub.token}"
    timeout = httpx2.Timeout(READ_S, connect=CONNECT_S)
    with get_session().stream(
        "GET", url, headers=headers, timeout=timeout, follow_redirects=False
    ) as response:
        yield response


@contextmanager
def _translated(hub: Hub, asked: HubId) -> Iterator[None]:
    """Turns what the HTTP library raises into one line with a way out."""
    try:
        yield
    except httpx2.ConnectError as error:
        raise PassingError(
            f"{asked}: {hub.host} cannot be reached ({_reason(error)}); is there a network?"
        ) from error
    except httpx2.TimeoutException as error:
        raise PassingError(f"{asked}: {hub.host} does not answer in time; run it again to go on") from error
    except (httpx2.TransportError, httpx2.DecodingError) as error:
        raise PassingError(
            f"{asked}: the connection to {hub.host} broke off ({_reason(error)}); run it again to go on"
        ) from error
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise DataError(f"{asked}: {hub.host} points to no address: {_reason(error)}") from error


def _require_good(hub: Hub, response: httpx2.Response, asked: HubId) -> None:
    """Raises what an answer means that is not the thing itself."""
    if response.status_code not in (200, 206):
        raise _fault(hub, response.status_code, response.headers, asked)
    if response.headers.get("content-type", "").partition(";")[0].strip().lower() == "text/html":
        raise DataError(
            f"{asked}: {urlsplit(str(response.url)).netloc} answers with a web page; "
            "does a proxy or a login page stand between?"
        )


def _fault(hub: Hub, status: int, headers: Mapping[str, str], asked: HubId) -> PocketsizeError:
    """The error that a status and the hub's own code for it stand for."""
    code, said = headers.get("x-error-code", ""), headers.get("x-error-message", "")
    page = f"{hub.endpoint}/{asked.repo}"
    if code == "GatedRepo":
        way = "with that account" if hub.token else "and set HF_TOKEN (or run: hf auth login)"
        return ResourceError(f"{asked}: gated; accept its terms on {page} {way}")
    if code == "RevisionNotFound":
        return UsageError(f"{asked}: no revision {asked.branch!r}; those there are stand on {page}")
    if said == "Access to this resource is disabled.":
        return ResourceError(f"{asked}: {hub.host} has disabled it; see {page}")
    if status == 401 and hub.token and "nvalid" in said:
        return ResourceError(
            f"{hub.host} refuses the token (401); renew it (hf auth login), or unset HF_TOKEN"
        )
    if status in (401, 404) and code != "EntryNotFound":
        way = "is it visible to your token's account?" if hub.token else "set HF_TOKEN if it is private"
        return UsageError(f"{asked}: no such model on {hub.host}; check the name; {way}")
    if status == 429:
        return _limited(hub, headers, asked)
    if status == 416:
        return IntegrityError(f"{asked}: a file on {hub.host} is shorter than listed; run it again later")
    if status == 408 or status >= 500:
        return PassingError(f"{asked}: {hub.host} answers {status}; run it again later to go on")
    if status == 403:
        return ResourceError(
            f"{asked}: {hub.host} gives no access (403); has the token the right to read it?"
        )
    return DataError(f"{asked}: {hub.host} answers {status}, which is none of a hub's answers")


def _limited(hub: Hub, headers: Mapping[str, str], asked: HubId) -> PassingError:
    """Too many requests: the wait is in Retry-After, or as `t` in RateLimit."""
    stated = re.search(r"^(\d+)$", headers.get("retry-after", "").strip())
    stated = stated or re.search(r"\bt=(\d+)", headers.get("ratelimit", ""))
    wait = int(stated[1]) if stated else 0
    when = f"in {wait} s" if wait else "later"
    way = "" if hub.token else "; HF_TOKEN raises the limit"
    line = f"{asked}: {hub.host} limits requests (429); run it again {when} to go on{way}"
    return PassingError(line, wait_s=wait)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def _is_safe(url: str, *, local: bool) -> bool:
    """Whether an address is over TLS; `local` lets this machine itself speak plain HTTP."""
    try:
        scheme, host, _ = _origin(url)
    except ValueError:
        return False
    return bool(host) and (scheme == "https" or (local and scheme == "http" and host in _LOCAL))


def _shown(url: str) -> str:
    """An address without what is secret in it: signed addresses carry their key behind the question mark."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{parts.path[:80]}"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
