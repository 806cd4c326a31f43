"""The wire format: JSON over HTTP, images as base64 PNG. Nothing in it can execute code."""

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

MAX_BYTES = 64_000_000


class ServerUnavailable(Exception):
    """The server does not answer, or not in the expected format. The samples get NaN and the run continues."""


@dataclass(frozen=True)
class Peer:
    """A server: base URL, bearer token, timeout in seconds, retries and the pause between them in seconds."""

    url: str
    token: str = field(default="", repr=False)
    timeout: float = 60.0
    retries: int = 2
    pause: float = 0.5

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RewardError(f"{self.url!r} is not a server address. Use a URL such as http://127.0.0.1:8000")


def encode_png(image: np.ndarray) -> str:
    """Base64 PNG of an image, uint8 (H, W, 3)."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


@contextmanager
def opened_png(text: str, max_pixels: int) -> Iterator[Image.Image]:
    """A base64 PNG with its size checked from the header, before any pixels are decoded."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise RewardError(
                    f"An image has {pixels} pixels, but at most {max_pixels} are accepted. Send a smaller one."
                )
            yield image
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, RewardError):
            raise
        raise RewardError("An image cannot be read. Send each image as base64 of a PNG file.") from error


def png_size(text: str, max_pixels: int) -> tuple[int, int]:
    """Height and width of a base64 PNG, from its header."""
    with opened_png(text, max_pixels) as image:
        return image.height, image.width


def decode_png(text: str, max_pixels: int) -> np.ndarray:
    """The image in a base64 PNG, uint8 (H, W, 3)."""
    with opened_png(text, max_pixels) as image:
        return np.array(image.convert("RGBA").convert("RGB"))


def ask(peer: Peer, path: str, payload: dict[str, Any] | None = None) -> Any:
    """The JSON answer to a GET, or to a POST if there is a payload. Redirects are not followed.

    Raises ServerUnavailable if all attempts fail, RewardError if the server rejects the request.
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
            return decode_json(body)
        if 400 <= status < 500 and status not in (408, 429):
            reason = body[:200].decode("utf-8", "replace")
            raise RewardError(
                f"{peer.url}{path} rejected the request with status {status}: {reason}. Fix the request or the token."
            )
        problem = f"status {status}"
    raise ServerUnavailable(f"{peer.url}{path} gave no answer in {1 + peer.retries} attempts ({problem}).")


def exchange(peer: Peer, path: str, payload: dict[str, Any] | None) -> tuple[int, bytes]:
    """One request on a new connection -> status and body."""
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
        return answer.status, answer.read(MAX_BYTES)
    finally:
        connection.close()


def decode_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ServerUnavailable(f"The answer of {len(body)} bytes is not JSON.") from error
