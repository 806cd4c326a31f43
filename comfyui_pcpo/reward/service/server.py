"""A reward as a server: GET /health, GET /info, POST /compute {"prompts", "images"} -> {"rewards"}.

It listens on loopback unless told otherwise, wants a bearer token, and refuses what is too large before reading it.
"""

import hmac
import json
import logging
import math
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comfyui_pcpo.reward.base import Reward, RewardError
from comfyui_pcpo.reward.service.wire import decode_png, png_size

log = logging.getLogger(__name__)
Size = tuple[int, int]  # height, width


class Refusal(Exception):
    """A request that is not served: HTTP status and the reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class ServerOptions:
    """Where to listen and how much to take: bytes, images, pixels per request, pixels per image, seconds per read."""

    host: str = "127.0.0.1"
    port: int = 0
    most_bytes: int = 64_000_000
    most_images: int = 256
    most_pixels: int = 4096 * 4096
    most_pixels_in_all: int = 8 * 4096 * 4096
    timeout: float = 30.0
    token: str = field(default_factory=lambda: os.environ.get("PCPO_REWARD_TOKEN", ""), repr=False)

    def __post_init__(self) -> None:
        if len(self.token) < 16:
            raise RewardError(
                f"PCPO_REWARD_TOKEN has {len(self.token)} characters, but a token needs 16 or more. "
                "Set it to a long random text, the same for server and trainer."
            )


class RewardServer(ThreadingHTTPServer):
    """Threads read requests side by side; the reward itself is asked by one at a time."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reward: Reward, options: ServerOptions | None = None):
        self.reward, self.options = reward, options or ServerOptions()
        self.lock = threading.Lock()
        if ":" in self.options.host:
            self.address_family = socket.AF_INET6
        super().__init__((self.options.host, self.options.port), Handler)

    def server_bind(self) -> None:
        if self.options.host == "::":  # every address means IPv4's too, which not every system takes for granted
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("A client left in the middle of an answer", exc_info=True)

    @property
    def is_everywhere(self) -> bool:
        """Whether it listens on every address of this machine."""
        return self.server_address[0] in ("0.0.0.0", "::")

    @property
    def url(self) -> str:
        """The address that clients use."""
        host = outer_address() if self.is_everywhere else self.options.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"

    def info(self) -> dict[str, Any]:
        ends = [end if math.isfinite(end) else None for end in self.reward.typical_range]
        return {
            "name": self.reward.name,
            "needs_prompt": self.reward.needs_prompt,
            "higher_is_better": self.reward.higher_is_better,
            "typical_range": ends,
        }

    def compute(self, request: Any) -> list[float | None]:
        """Scores in the order of the request; None stands for a failed one."""
        prompts, images, sizes = self.read(request)
        found: list[float | None] = [None] * len(prompts)
        for places in slices(sizes, self.reward.settings.images_at_once):
            batch = self.decode([images[n] for n in places])
            with self.lock:
                scores = self.reward.score(batch, [prompts[n] for n in places]).tolist()
            for n, value in zip(places, scores, strict=True):
                found[n] = value if math.isfinite(value) else None
        return found

    def decode(self, images: list[str]) -> Tensor:
        """Base64 PNGs of one size -> (B, H, W, 3) in [0, 1]."""
        try:
            pictures = [decode_png(image, self.options.most_pixels) for image in images]
        except RewardError as error:
            raise Refusal(400, str(error)) from error
        return torch.from_numpy(np.stack(pictures)).float().div_(255)

    def read(self, request: Any) -> tuple[list[str], list[str], list[Size]]:
        """Prompts, base64 PNGs and their sizes, every type and limit checked; no pixel is unpacked yet."""
        if not isinstance(request, dict) or set(request) != {"prompts", "images"}:
            raise Refusal(400, "The body must be an object with prompts and images.")
        prompts, images = request["prompts"], request["images"]
        for name, entries in (("prompts", prompts), ("images", images)):
            if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
                raise Refusal(400, f"{name} must be a list of strings.")
        if len(prompts) != len(images):
            raise Refusal(400, f"{len(images)} images came with {len(prompts)} prompts. Send one prompt per image.")
        if len(images) > self.options.most_images:
            raise Refusal(413, f"{len(images)} images are more than {self.options.most_images}. Send fewer at once.")
        try:
            sizes = [png_size(image, self.options.most_pixels) for image in images]
        except RewardError as error:
            raise Refusal(400, str(error)) from error
        pixels, most = sum(height * width for height, width in sizes), self.options.most_pixels_in_all
        if pixels > most:
            raise Refusal(
                413,
                f"{len(images)} images have {pixels} pixels, but at most {most} are taken in one request. "
                "Send fewer at once (images_at_once of the client), or smaller ones.",
            )
        return prompts, images, sizes


def slices(sizes: list[Size], most: int) -> Iterator[list[int]]:
    """The places of pictures that go together: of one size, and no more than `most`."""
    for size in sorted(set(sizes)):
        places = [n for n, other in enumerate(sizes) if other == size]
        yield from (places[start : start + most] for start in range(0, len(places), most))


def outer_address() -> str:
    """The address by which this machine goes out; its name where there is no way out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # asks for the route and sends nothing; RFC 5737 keeps this address unused
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


class Handler(BaseHTTPRequestHandler):
    server: RewardServer  # type: ignore[assignment]

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.options.timeout)

    def do_GET(self) -> None:
        self.answer({"/health": lambda: {"status": "ok"}, "/info": self.info})

    def do_POST(self) -> None:
        self.answer({"/compute": self.compute})

    def answer(self, routes: dict[str, Any]) -> None:
        """Send what the route returns, or why it refuses. A reward that raises costs this request, not the server."""
        try:
            if self.path not in routes:
                raise Refusal(404, "Use GET /health, GET /info or POST /compute.")
            status, body = 200, routes[self.path]()
        except Refusal as refusal:
            status, body = refusal.status, {"error": refusal.reason}
        except Exception as error:
            log.exception("The reward %s raised", self.server.reward.name)
            status, body = 500, {"error": f"The reward raised {type(error).__name__}; the server's log says more."}
        self.send(status, json.dumps(body).encode())

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
            raise Refusal(401, "The bearer token is missing or wrong. Set PCPO_REWARD_TOKEN as on the server.")

    def info(self) -> dict[str, Any]:
        self.check_token()
        return self.server.info()

    def compute(self) -> dict[str, Any]:
        self.check_token()
        return {"rewards": self.server.compute(self.body())}

    def body(self) -> Any:
        """The request's JSON, read only if its announced length is allowed."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refusal(411, "Content-Length is missing. Send the body in one piece.")
        if int(length[:20]) > self.server.options.most_bytes:
            raise Refusal(
                413, f"{length[:20]} bytes are more than {self.server.options.most_bytes}. Send fewer images."
            )
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refusal(400, "The body is not JSON.") from error
        except OSError as error:
            raise Refusal(408, "The body did not arrive in time.") from error

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
