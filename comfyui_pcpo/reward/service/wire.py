"""JSON over HTTP and pictures as base64 PNG: all that goes to another process, and nothing that could run there."""

import base64
import binascii
import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from comfyui_pcpo.reward.base import RewardError

MOST_BYTES = 64_000_000


class LostServer(Exception):
    """The other side does not answer, or not with what was agreed: the samples fail, the run goes on."""


@dataclass(frozen=True)
class Peer:
    """A server: base URL, bearer token, seconds to wait per try, tries beyond the first, seconds between them."""

    url: str
    token: str = field(default="", repr=False)
    timeout: float = 60.0
    retries: int = 2
    pause: float = 0.5

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RewardError(f"{self.url!r} is not a server address. Write it like http://127.0.0.1:8000")


def encode_png(picture: np.ndarray) -> str:
    """Base64 PNG of a picture, uint8 (H, W, 3)."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


@contextmanager
def opened_png(text: str, most_pixels: int) -> Iterator[Image.Image]:
    """A base64 PNG with its header read and its size checked, before a single pixel is unpacked."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as picture:
            pixels = picture.width * picture.height
            if pixels > most_pixels:
                raise RewardError(
                    f"A picture has {pixels} pixels, but at most {most_pixels} are taken. Send it smaller."
                )
            yield picture
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, RewardError):
            raise
        raise RewardError("A picture cannot be read. Send each as base64 of a PNG file.") from error


def png_size(text: str, most_pixels: int) -> tuple[int, int]:
    """Height and width of a base64 PNG, as its header tells."""
    with opened_png(text, most_pixels) as picture:
        return picture.height, picture.width


def decode_png(text: str, most_pixels: int) -> np.ndarray:
    """The picture in a base64 PNG, uint8 (H, W, 3)."""
    with opened_png(text, most_pixels) as picture:
        return np.array(picture.convert("RGBA").convert("RGB"))


def ask(peer: Peer, path: str, payload: dict[str, Any] | None = None) -> Any:
    """The JSON answer to GET, or to POST where there is a payload. Redirects are not followed.

    Raises LostServer when no try got an answer, RewardError when the server says that the request is wrong.
    """
    from http.client import HTTPException

    problem = ""
    for attempt in range(1 + peer.retries):
        if attempt:
            time.sleep(peer.pause)
        try:
            status, body = exchange(peer, path, payload)
        except (OSError, HTTPException) as error:
            problem = f"{type(error).__name__}: {error}"
            continue
        if status == 200:
            return parse(body)
        if 400 <= status < 500 and status not in (408, 429):
            reason = body[:200].decode("utf-8", "replace")
            raise RewardError(
                f"{peer.url}{path} refused with status {status}: {reason}. Mend the request or its token."
            )
        problem = f"status {status}"
    raise LostServer(f"{peer.url}{path} gave no answer in {1 + peer.retries} tries ({problem}).")


def exchange(peer: Peer, path: str, payload: dict[str, Any] | None) -> tuple[int, bytes]:
    """One request on a connection of its own -> status and body."""
    from http.client import HTTPConnection, HTTPSConnection

    parts = urlsplit(peer.url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=peer.timeout)
    headers = {"Authorization": f"Bearer {peer.token}"} if peer.token else {}
    try:
        if payload is None:
            connection.request("GET", parts.path.rstrip("/") + path, headers=headers)
        else:
            headers["Content-Type"] = "application/json"
            connection.request("POST", parts.path.rstrip("/") + path, json.dumps(payload).encode(), headers)
        answer = connection.getresponse()
        return answer.status, answer.read(MOST_BYTES)
    finally:
        connection.close()


def parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise LostServer(f"The answer of {len(body)} bytes is not JSON.") from error
