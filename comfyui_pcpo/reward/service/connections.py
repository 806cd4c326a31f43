"""The server's side of its connections: a limit on those without the token, a deadline, and the machine's address."""

import io
import socket
import threading
import time
from contextlib import suppress
from typing import Any


class Strangers:
    """Connections that have not shown the token; beyond the limit, the oldest is closed for the newest."""

    def __init__(self, limit: int):
        self.limit = limit
        self.lock = threading.Lock()
        self.waiting: dict[socket.socket, None] = {}  # oldest first

    def admit(self, connection: socket.socket) -> None:
        """Add a new connection."""
        with self.lock:
            self.waiting[connection] = None
            extra = list(self.waiting)[: -self.limit]
            for oldest in extra:
                del self.waiting[oldest]
        for oldest in extra:
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread wakes up and closes it

    def release(self, connection: socket.socket) -> None:
        """Remove one that has shown the token, or is closed."""
        with self.lock:
            self.waiting.pop(connection, None)


class TimedReader(io.RawIOBase):
    """Reads from a connection until a deadline, however slowly the bytes arrive."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection, self.end = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not arrive in time")
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


def outer_address() -> str:
    """Address of the default network route; the host name without one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # looks up the route and sends nothing; RFC 5737 reserves this address
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()
