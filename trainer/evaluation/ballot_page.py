"""A page on this computer that asks a person: an address to open, a question at a time."""

import json
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import comfyui_pcpo
from comfyui_pcpo.json_text import parse_json
from comfyui_pcpo.taste.booth import Booth, NotOpen
from comfyui_pcpo.taste.human import Question, Reply

ADDRESS = "/vote"
MOST_BYTES = 100_000  # of an answer
PAGE = """<!doctype html><meta charset="utf-8"><title>PCPO: compare</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body { margin: 0; height: 100vh; background: #1b1c1f; color: #ddd; font: 16px Inter, sans-serif; display: grid; }
main { width: min(1100px, 96vw); height: min(820px, 94vh); margin: auto; } p { text-align: center; }</style>
<main></main>
<script type="module">
import { Ballot, addStyle } from "/ballot.js";
addStyle();
const main = document.querySelector("main");
const ballot = new Ballot({ request: (path, options) => fetch(path, options), url: (path) => path });
let seen = false;
async function look() {
  try {
    const question = await (await fetch("/vote")).json();
    const isNew = ballot.show(question.open ? question : null);
    if (question.open && isNew) { main.replaceChildren(ballot.root); ballot.root.focus(); seen = true; }
  } catch { main.innerHTML = seen ? "<p>Finished. You can close this page.</p>" : "<p>Waiting for the program.</p>"; }
  setTimeout(look, 200);
}
look();
</script>
"""


def script() -> bytes:
    """The panel, which is the same as in ComfyUI; it lies beside the library where that is installed."""
    library = Path(str(comfyui_pcpo.__file__)).parent
    files = [folder / "web" / "js" / "ballot.js" for folder in (library, library.parent)]
    return next(file for file in files if file.is_file()).read_bytes()


class PageHandler(BaseHTTPRequestHandler):
    @property
    def booth(self) -> Booth:
        assert isinstance(self.server, BallotServer)
        return self.server.booth

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal belongs to the command."""

    def do_GET(self) -> None:
        image = re.fullmatch(rf"{ADDRESS}/(\w+)/(\d+)\.png", self.path)
        try:
            if self.path == "/":
                self.reply(200, PAGE.encode(), "text/html; charset=utf-8")
            elif self.path == "/ballot.js":
                self.reply(200, script(), "text/javascript")
            elif self.path == ADDRESS:
                self.reply_json(200, self.booth.tree(ADDRESS))
            elif image:
                self.reply(200, self.booth.image(image[1], int(image[2])), "image/png")
            else:
                self.reply_json(404, {"error": f"There is nothing at {self.path}. Open /."})
        except NotOpen as error:
            self.reply_json(404, {"error": str(error)})

    def do_POST(self) -> None:
        given = self.headers.get("Content-Length", "0")
        length = int(given) if given.isascii() and given.isdigit() and len(given) < 10 else MOST_BYTES + 1
        local = self.headers.get("Origin", "").partition("//")[2] in ("", self.headers.get("Host"))
        if not local or length > MOST_BYTES:
            self.reply_json(403, {"error": "Answers come from this server's own page and are short."})
            return
        try:
            self.booth.answer(self.path.rpartition("/")[2], parse_json(self.rfile.read(length)))
        except NotOpen as error:
            self.reply_json(409, {"error": str(error)})
        except ValueError as error:  # VoteError, or no JSON
            self.reply_json(400, {"error": str(error)})
        else:
            self.reply_json(200, {"accepted": True})

    def reply_json(self, status: int, tree: dict[str, Any]) -> None:
        self.reply(status, json.dumps(tree).encode(), "application/json")

    def reply(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)


class BallotServer(ThreadingHTTPServer):
    """Serves the page on 127.0.0.1 while it is entered."""

    daemon_threads = True

    def __init__(self, port: int = 0, tick: Callable[[], None] = lambda: None):
        super().__init__(("127.0.0.1", port), PageHandler)
        self.booth = Booth(lambda is_open: None, tick)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """No traceback for a page that was closed before its answer was sent."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def ask(self, question: Question, /) -> Reply:
        return self.booth.ask("", question)

    def serving(self) -> AbstractContextManager[Any]:
        """`with server.serving():` answers requests in another thread."""
        return _Serving(self)


class _Serving:
    def __init__(self, server: BallotServer):
        self.server, self.thread = server, Thread(target=server.serve_forever, daemon=True)

    def __enter__(self) -> BallotServer:
        self.thread.start()
        return self.server

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
