"""Requests to a server: JSON over HTTP, with a deadline, and with patience for an outage."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from comfyui_pcpo.json_text import parse_json
from comfyui_pcpo.reward.base import RewardError

logger = logging.getLogger(__name__)
MAX_BYTES = 64_000_000
POLL = 0.1  # seconds between two calls of `tick`
LONGEST_PAUSE = 10.0
FIXES = {401: "Fix the token.", 403: "Fix the token.", 422: "Fix the prompt, or the server's reward."}
"""What to do about a rejection, by its status."""


class ServerUnavailable(RewardError):
    """A server that does not answer, or only with errors of its own."""

    fix = "Start the server, or check its address."


class ServerFailed(ServerUnavailable):
    """A server that answers with an error of its own."""

    fix = "Read the server's log."


class BadAnswer(RewardError):
    """A server that answers, but not in the expected format."""


@dataclass(frozen=True)
class Peer:
    """A server: base URL, bearer token, and in seconds the deadline of a request, the patience and the first pause.

    After a first failure, requests are repeated as long as they begin within the patience.
    """

    url: str
    token: str = field(default="", repr=False)
    timeout: float = 120.0
    patience: float = 60.0
    pause: float = 0.5

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port or an IPv6 address that is none
            parts, fits = urlsplit(""), False
        if not fits or parts.username or parts.query or parts.fragment or not is_plain(self.url):
            raise RewardError(f"{self.url!r} is not a server address. Use a URL such as http://127.0.0.1:8000")
        if not is_plain(self.token):
            raise RewardError(
                "The token has spaces, line breaks or letters beyond ASCII. Use visible ASCII characters."
            )


def is_plain(text: str) -> bool:
    """Whether a text can be sent in an HTTP header: visible ASCII characters only."""
    return all("!" <= character <= "~" for character in text)


def ask(peer: Peer, path: str, payload: dict[str, Any] | None = None, tick: Callable[[], None] = lambda: None) -> Any:
    """The JSON answer to a GET, or to a POST if there is a payload; `tick` is called while waiting and may raise.

    Each request has `peer.timeout` seconds, and an outage is waited out as Peer says; redirects are not followed.
    Raises ServerUnavailable after an outage, BadAnswer for an answer that is not JSON, RewardError if the server
    rejects the request.
    """
    body = None if payload is None else json.dumps(payload).encode()
    end: float | None = None  # of the patience
    for pause in pauses(peer.pause):
        try:
            return read_answer(peer, path, exchange(peer, path, body, tick))
        except ServerUnavailable as error:
            now = time.monotonic()
            if end is None:
                end = now + peer.patience
                if peer.patience:
                    logger.warning("%s Waiting up to %g s for it.", error, peer.patience)
            if now + pause > end:
                waited = f" It was tried for {peer.patience:g} s." if peer.patience else ""
                raise type(error)(f"{error}{waited} {error.fix}") from error
        wait(pause, tick)
    raise AssertionError("pauses never end")


def pauses(first: float) -> Iterator[float]:
    """Doubling pauses."""
    while True:
        yield min(first, LONGEST_PAUSE)
        first *= 2


def wait(seconds: float, tick: Callable[[], None]) -> None:
    """Sleep, and tick."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(POLL, left))
        tick()


@dataclass(frozen=True)
class Answer:
    """Status, body, and where a redirect leads."""

    status: int
    body: bytes
    location: str = ""

    @property
    def reason(self) -> str:
        return " ".join(self.body[:300].decode("utf-8", "replace").split())


def exchange(peer: Peer, path: str, body: bytes | None, tick: Callable[[], None]) -> Answer:
    """One request on a new connection, in a thread, so that it ends at its deadline and whenever `tick` raises."""
    parts = urlsplit(peer.url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=2 * peer.timeout)  # the deadline below is earlier
    headers = {"Authorization": f"Bearer {peer.token}"} if peer.token else {}
    result: list[Answer | Exception] = []

    def work() -> None:
        try:
            result.append(converse(connection, parts.path.rstrip("/") + path, body, headers))
        except (OSError, HTTPException, UnicodeError) as error:  # UnicodeError: a host name that cannot exist
            result.append(error)

    thread, end = threading.Thread(target=work, daemon=True), time.monotonic() + peer.timeout
    thread.start()
    try:
        while not result and thread.is_alive() and time.monotonic() < end:
            thread.join(POLL)
            tick()
    finally:
        hang_up(connection)
    if not result:
        raise ServerUnavailable(f"{peer.url} gave no complete answer within {peer.timeout:g} s.")
    if isinstance(result[0], Exception):
        raise ServerUnavailable(f"{peer.url} does not answer ({type(result[0]).__name__}: {result[0]}).")
    return result[0]


def converse(connection: HTTPConnection, path: str, body: bytes | None, headers: dict[str, str]) -> Answer:
    """Send a request and read its answer."""
    lost: OSError | None = None
    try:
        if body is None:
            connection.request("GET", path, headers=headers)
        else:
            connection.request("POST", path, body, headers | {"Content-Type": "application/json"})
    except (BrokenPipeError, ConnectionResetError, ConnectionAbortedError) as error:
        lost = error  # a server may answer, with 401 for example, and leave before it has read a large body
    try:
        answer = connection.getresponse()
    except (OSError, HTTPException) as error:
        raise lost or error from None
    content = answer.read(MAX_BYTES)
    if answer.length and len(content) < MAX_BYTES:
        raise ConnectionResetError(f"the connection ended after {len(content)} bytes of the answer")
    return Answer(answer.status, content, answer.headers.get("Location", ""))


def hang_up(connection: HTTPConnection) -> None:
    """Close a connection, also under a thread that is waiting for it."""
    if connection.sock is not None:
        with suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def read_answer(peer: Peer, path: str, answer: Answer) -> Any:
    """The JSON of an answer, or the error that its status stands for."""
    if answer.status == 200:
        return decode_json(answer.body)
    if 300 <= answer.status < 400:
        raise RewardError(
            f"{peer.url}{path} redirects to {answer.location}, and redirects are not followed. Set the URL of the "
            "server that answers."
        )
    if 400 <= answer.status < 500 and answer.status not in (408, 425, 429):
        raise RewardError(
            f"{peer.url}{path} rejected the request with status {answer.status}: {answer.reason}. "
            f"{FIXES.get(answer.status, 'Fix the request, or check the address.')}"
        )
    absent = answer.status in (502, 503, 504)  # as proxies answer for a server that is not running
    raise (ServerUnavailable if absent else ServerFailed)(
        f"{peer.url}{path} answers with status {answer.status}: {answer.reason}."
    )


def decode_json(body: bytes) -> Any:
    """The JSON of an answer's body. Raises BadAnswer for anything else."""
    try:
        return parse_json(body)
    except ValueError as error:
        raise BadAnswer(f"the answer of {len(body)} bytes is not JSON. Check the server's address.") from error
