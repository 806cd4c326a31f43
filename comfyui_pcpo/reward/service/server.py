"""An HTTP server for a reward: GET /health, GET /info, POST /compute {"prompts", "images", "metadata"} -> {"rewards"}.

It listens on loopback by default, requires a bearer token, and rejects oversized requests before reading them.
"""

import hmac
import io
import json
import logging
import math
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.json_text import parse_json
from comfyui_pcpo.prompt import Prompt
from comfyui_pcpo.reward.base import Reward, RewardError
from comfyui_pcpo.reward.group import GroupReward
from comfyui_pcpo.reward.service.connections import Strangers, TimedReader, outer_address
from comfyui_pcpo.reward.service.images import decode_png, png_size
from comfyui_pcpo.reward.service.wire import ServerUnavailable, is_plain

logger = logging.getLogger(__name__)
Size = tuple[int, int]  # height, width
DRAIN = 2.0  # seconds for the rest of a rejected request


class RequestRejected(Exception):
    """A rejected request: HTTP status and reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class ServerOptions:
    """Address and limits: bytes and images per request, pixels per image and per request, seconds until a request has
    arrived, connections that have not shown the token."""

    host: str = "127.0.0.1"
    port: int = 0
    max_bytes: int = 64_000_000
    max_images: int = 256
    max_pixels: int = 4096 * 4096
    max_total_pixels: int = 8 * 4096 * 4096
    timeout: float = 60.0
    max_strangers: int = 32
    token: str = field(default_factory=lambda: os.environ.get("PCPO_REWARD_TOKEN", ""), repr=False)

    def __post_init__(self) -> None:
        if len(self.token) < 16:
            raise RewardError(
                f"PCPO_REWARD_TOKEN has {len(self.token)} characters, but must have 16 or more. "
                "Set it to a long random string, the same for server and trainer."
            )
        if not is_plain(self.token):
            raise RewardError(
                "PCPO_REWARD_TOKEN has spaces, line breaks or letters beyond ASCII. Use visible ASCII characters."
            )


class RewardServer(ThreadingHTTPServer):
    """Reads requests in threads; one thread at a time uses the reward."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reward: Reward, options: ServerOptions | None = None):
        if isinstance(reward, GroupReward):
            raise RewardError(
                f"{reward.name} compares the images of a group, and the protocol has no groups. Use it in the process "
                "that trains."
            )
        self.reward, self.options = reward, options or ServerOptions()
        self.lock = threading.Lock()
        self.strangers = Strangers(self.options.max_strangers)
        if ":" in self.options.host:
            self.address_family = socket.AF_INET6
        super().__init__((self.options.host, self.options.port), Handler)

    def server_bind(self) -> None:
        if self.options.host == "::":  # accept IPv4 as well, which is not every system's default
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.strangers.admit(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.strangers.release(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("A client disconnected before the answer was complete", exc_info=True)

    @property
    def is_everywhere(self) -> bool:
        """Whether it listens on every address of this machine."""
        return self.server_address[0] in ("0.0.0.0", "::")

    @property
    def url(self) -> str:
        """The address for clients."""
        host = outer_address() if self.is_everywhere else self.options.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"

    def info(self) -> dict[str, Any]:
        ends = [end if math.isfinite(end) else None for end in self.reward.typical_range]
        return {
            "name": self.reward.name,
            "needs_prompt": self.reward.needs_prompt,
            "typical_range": ends,
        }

    def compute(self, request: Any) -> list[float | None]:
        """Scores in the order of the request; None marks a failed score."""
        prompts, images, sizes = self.read(request)
        results: list[float | None] = [None] * len(prompts)
        for indices in micro_batches(sizes, self.reward.settings.images_at_once):
            batch = self.decode([images[n] for n in indices])
            with self.lock:
                scores = self.reward.score(batch, [prompts[n] for n in indices]).tolist()
            for n, value in zip(indices, scores, strict=True):
                results[n] = value if math.isfinite(value) else None
        return results

    def decode(self, images: list[str]) -> Tensor:
        """Base64 PNGs of one size -> (B, H, W, 3) in [0, 1]."""
        try:
            arrays = [decode_png(image, self.options.max_pixels) for image in images]
        except RewardError as error:
            raise RequestRejected(400, str(error)) from error
        return torch.from_numpy(np.stack(arrays)).float().div_(255)

    def read(self, request: Any) -> tuple[list[str], list[str], list[Size]]:
        """Prompts, base64 PNGs and their sizes, after all checks of types and limits; no pixels are decoded yet."""
        if not isinstance(request, dict) or set(request) | {"metadata"} != {"prompts", "images", "metadata"}:
            raise RequestRejected(400, "The body must be an object with prompts and images, and metadata if any.")
        prompts, images = request["prompts"], request["images"]
        for name, entries in (("prompts", prompts), ("images", images)):
            if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
                raise RequestRejected(400, f"{name} must be a list of strings.")
        if len(prompts) != len(images):
            raise RequestRejected(
                400, f"Got {len(images)} images and {len(prompts)} prompts. Send one prompt per image."
            )
        if len(images) > self.options.max_images:
            raise RequestRejected(
                413,
                f"Got {len(images)} images, but a request may have {self.options.max_images}. Send fewer.",
            )
        try:
            sizes = [png_size(image, self.options.max_pixels) for image in images]
        except RewardError as error:
            raise RequestRejected(400, str(error)) from error
        pixels, limit = sum(height * width for height, width in sizes), self.options.max_total_pixels
        if pixels > limit:
            raise RequestRejected(
                413,
                f"{len(images)} images have {pixels} pixels, but at most {limit} are accepted per request. "
                "Send fewer (the client's images_at_once) or smaller images.",
            )
        return with_metadata(prompts, request.get("metadata")), images, sizes


def with_metadata(prompts: list[str], metadata: Any) -> list[str]:
    """Prompts with the request's metadata, an object for each; None is a request without."""
    if metadata is None:
        return prompts
    objects = isinstance(metadata, list) and all(isinstance(entry, dict) for entry in metadata)
    if not objects or len(metadata) != len(prompts):
        raise RequestRejected(400, "metadata must be a list of one object per prompt.")
    return [Prompt(prompt, entry) for prompt, entry in zip(prompts, metadata, strict=True)]


def micro_batches(sizes: list[Size], batch_size: int) -> Iterator[list[int]]:
    """Indices of up to `batch_size` images of equal size."""
    for size in sorted(set(sizes)):
        indices = [n for n, other in enumerate(sizes) if other == size]
        yield from (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))


class Handler(BaseHTTPRequestHandler):
    """One request to a RewardServer."""

    server: RewardServer  # type: ignore[assignment]

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.options.timeout)  # for the answer: the most that sending may take
        self.rfile.close()
        self.rfile = io.BufferedReader(TimedReader(self.connection, self.server.options.timeout))

    def do_GET(self) -> None:
        self.answer({"/health": lambda: {"status": "ok"}, "/info": self.info})

    def do_POST(self) -> None:
        self.answer({"/compute": self.compute})

    def answer(self, routes: dict[str, Any]) -> None:
        """Send the route's result or the reason of its rejection. Exceptions in the reward fail only this request."""
        try:
            if self.path not in routes:
                raise RequestRejected(404, "Use GET /health, GET /info or POST /compute.")
            status, body = 200, routes[self.path]()
        except RequestRejected as refused:
            status, body = refused.status, {"error": refused.reason}
        except ServerUnavailable as error:  # 503, which the client waits out: the reward's own server may come back
            logger.warning("%s", error)
            status, body = 503, {"error": str(error)}
        except RewardError as error:  # 422, because the same request would fail again
            logger.warning("%s", error)
            status, body = 422, {"error": str(error)}
        except Exception as error:
            logger.exception("A request failed")
            status, body = 500, {"error": f"The server failed with {type(error).__name__}; see its log."}
        self.connection.settimeout(self.server.options.timeout)
        self.send(status, json.dumps(body).encode())
        if status != 200:
            self.drain()

    def drain(self) -> None:
        """Read what is left of a rejected request: closing before that would lose the answer on its way."""
        self.connection.shutdown(socket.SHUT_WR)
        rest = io.BufferedReader(TimedReader(self.connection, DRAIN))
        with suppress(OSError):
            while rest.read(1 << 16):
                pass

    def send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def check_token(self) -> None:
        sent = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(sent, f"Bearer {self.server.options.token}".encode()):
            raise RequestRejected(
                401, "The bearer token is missing or wrong. Set PCPO_REWARD_TOKEN to the server's token."
            )
        self.server.strangers.release(self.connection)

    def info(self) -> dict[str, Any]:
        self.check_token()
        return self.server.info()

    def compute(self) -> dict[str, Any]:
        self.check_token()
        return {"rewards": self.server.compute(self.body())}

    def body(self) -> Any:
        """The request's JSON, read only if its Content-Length is within the limit."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise RequestRejected(411, "Content-Length is missing. Send the body in one piece.")
        if len(length) > 20 or int(length) > self.server.options.max_bytes:
            raise RequestRejected(
                413,
                f"The body has {length[:20]} bytes, but at most {self.server.options.max_bytes} are accepted. "
                "Send fewer images.",
            )
        try:
            return parse_json(self.rfile.read(int(length)))
        except ValueError as error:
            raise RequestRejected(400, "The body is not JSON.") from error
        except OSError as error:
            raise RequestRejected(408, "The body did not arrive in time.") from error

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
