"""Weight files from a hub: checked, resumed, and named when they are wrong; a small server stands for the hub."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request

import pytest

from comfyui_pcpo.reward import REWARDS, Reward, RewardError, RewardSettings, download
from comfyui_pcpo.reward.base import RewardFile
from comfyui_pcpo.reward.weights.checkpoint import file_path, locate
from comfyui_pcpo.reward.weights.hub import is_intact, may_send_token, stream
from trainer.cli.main import main

LARGE, SMALL = bytes(range(256)) * 40_000, b'{"hidden_size": 2}'


class Two(Reward):
    """A reward with a large file and a small one, as the hub stores them."""

    name = "two"
    files = (
        RewardFile("someone/things", "weights.pt", len(LARGE), "MIT"),
        RewardFile("someone/things", "config.json", len(SMALL), "MIT"),
    )


class Hub(ThreadingHTTPServer):
    """The hub's file endpoints; it may break an answer off once (and then leave), or send other bytes than it tells."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {"weights.pt": LARGE, "config.json": SMALL}
        self.breaks_at, self.leaves, self.damage, self.ranges, self.sent = None, False, False, [], 0
        self.bare = False  # a mirror that knows neither checksums nor commits

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.reply(body=False)

    def do_GET(self):
        self.reply(body=True)

    def reply(self, body):
        hub, name = self.server, self.path.split("/")[-1]
        if not self.path.startswith("/someone/things/resolve/") or name not in hub.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = hub.files[name]
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        if not hub.bare:
            self.send_checksums(name, content)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body:
            hub.ranges.append(start)
            self.send(content[start:])

    def send_checksums(self, name, content):
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{git}"')
        if name == "weights.pt":
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(content)))

    def send(self, content):
        hub = self.server
        if hub.damage:
            content = bytes([content[0] ^ 1]) + content[1:]
        if hub.breaks_at is not None:
            content = content[: hub.breaks_at]
            hub.breaks_at, hub.files = None, {} if hub.leaves else hub.files
            self.close_connection = True
        hub.sent += len(content)
        self.wfile.write(content)

    def log_message(self, *args):
        pass


class Sender(ThreadingHTTPServer):
    """Sends /here on to its own /end and /away to the /end of `other`, and keeps the headers that it was asked with."""

    daemon_threads = True

    def __init__(self, other=""):
        super().__init__(("127.0.0.1", 0), Redirect)
        self.places = {"/here": "/end", "/away": f"{other}/end"}
        self.headers = []


class Redirect(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.headers.append(self.headers)
        place = self.server.places.get(self.path)
        self.send_response(200 if place is None else 302)
        if place is not None:
            self.send_header("Location", place)
        self.end_headers()
        self.wfile.write(b"" if place is not None else b"weights")

    def log_message(self, *args):
        pass


@pytest.fixture
def senders():
    """A server at 127.0.0.1 that sends its guests away to another one, which they know as localhost."""
    other = Sender()
    one = Sender(f"http://localhost:{other.server_address[1]}")
    for server in (one, other):
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield one, other
    for server in (one, other):
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("path", "shown"), [("/here", "Bearer secret"), ("/away", None)])
def test_a_redirect_takes_the_login_along_to_the_same_host_only(path, shown, senders, tmp_path):
    one, other = senders
    url = f"http://127.0.0.1:{one.server_address[1]}{path}"
    request = Request(url, headers={"Authorization": "Bearer secret", "Accept-Encoding": "identity"})
    stream(request, tmp_path / "weights.part", 3, lambda done: None)
    assert (tmp_path / "weights.part").read_bytes() == b"weights"
    first, last = [*one.headers, *other.headers]
    assert first["Authorization"] == "Bearer secret" and last["Authorization"] == shown
    assert last["Range"] == "bytes=3-" and last["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("after", "may"),
    [
        ("https://hub.example/b", True),
        ("http://hub.example/a", False),
        ("https://cdn.hub.example/a", False),
        ("https://hub.example:8443/a", False),
        ("https://hub.example@evil.example/a", False),
    ],
)
def test_a_login_stays_with_its_host_and_its_encryption(after, may):
    assert may_send_token("https://hub.example/a", after) is may
    assert may_send_token("http://hub.example/a", "https://hub.example/a")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # tests are offline elsewhere
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_files_come_to_the_place_where_they_are_sought_and_only_once(hub, tmp_path):
    paths = download(Two, tmp_path, hub.url)
    assert paths == [locate(RewardSettings(folder=tmp_path), file, "two") for file in Two.files]
    assert [path.read_bytes() for path in paths] == [LARGE, SMALL]
    assert hub.sent == len(LARGE) + len(SMALL)
    download(Two, tmp_path, hub.url)
    assert hub.sent == len(LARGE) + len(SMALL)


def test_a_line_that_breaks_once_costs_nothing(hub, tmp_path):
    hub.breaks_at = 3_000_000
    assert download(Two, tmp_path, hub.url)[0].read_bytes() == LARGE
    assert hub.ranges == [0, 3_000_000, 0]


def test_a_download_that_was_given_up_goes_on_where_it_stopped(hub, tmp_path):
    whole, hub.breaks_at, hub.leaves = dict(hub.files), 3_000_000, True
    with pytest.raises(RewardError, match=r"weights.pt from someone/things could not be fetched.*Try again"):
        download(Two, tmp_path, hub.url)
    assert not file_path(tmp_path, Two.files[0]).exists()
    hub.files, hub.ranges = whole, []
    download(Two, tmp_path, hub.url)
    assert hub.ranges == [3_000_000, 0]  # the rest of the large file, and the small one
    assert file_path(tmp_path, Two.files[0]).read_bytes() == LARGE


def test_a_file_that_was_damaged_on_the_way_is_deleted_and_named(hub, tmp_path):
    hub.damage = True
    with pytest.raises(RewardError, match=r"weights.pt from someone/things has 10240000 bytes whose checksum"):
        download(Two, tmp_path, hub.url)
    assert not file_path(tmp_path, Two.files[0]).exists()
    hub.damage = False
    assert download(Two, tmp_path, hub.url)[0].read_bytes() == LARGE


@pytest.mark.parametrize("content", [LARGE[:1000], LARGE[:-1] + b"x", b""])
def test_a_wrong_file_at_that_place_is_fetched_anew(content, hub, tmp_path):
    path = file_path(tmp_path, Two.files[0])
    path.parent.mkdir()
    path.write_bytes(content)
    download(Two, tmp_path, hub.url)
    assert path.read_bytes() == LARGE
    path.write_bytes(content)  # damaged after the download, which the hub's own library would not see
    download(Two, tmp_path, hub.url)
    assert path.read_bytes() == LARGE


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("answer", [b"oops\n", b"", bytes(3 * len(LARGE))])
def test_what_a_mirror_sends_instead_of_a_file_replaces_nothing(bare, answer, hub, tmp_path, monkeypatch, capsys):
    """A page of 5 bytes with status 200, for example, whether the mirror tells checksums or not."""
    monkeypatch.setitem(REWARDS, "two", Two)
    path = file_path(tmp_path, Two.files[0])
    path.parent.mkdir()
    path.write_bytes(LARGE)
    hub.bare, hub.files["weights.pt"] = bare, answer
    assert main(["download", "two", "--folder", str(tmp_path), "--endpoint", hub.url]) == 2
    assert f"has {len(answer)} bytes there, but about {len(LARGE)} are expected" in capsys.readouterr().err
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]
    assert path.read_bytes() == LARGE


def test_a_file_that_the_hub_lacks_and_a_hub_that_is_not_there_are_named(hub, tmp_path):
    del hub.files["config.json"]
    with pytest.raises(RewardError, match=r"config.json from someone/things could not be fetched"):
        download(Two, tmp_path, hub.url)
    with pytest.raises(RewardError, match=r"weights.pt from someone/things could not be fetched"):
        download(Two, tmp_path, "http://127.0.0.1:1")


def test_checksums_are_sha256_of_large_files_and_gits_of_small_ones(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"hello\n")
    assert is_intact(path, "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03", 6)
    assert is_intact(path, "ce013625030ba8dba906f756967f9e9ca394464a", None)  # what `git hash-object` says
    assert not is_intact(path, "ce013625030ba8dba906f756967f9e9ca394464b", None)
    assert not is_intact(path, None, 7)


def test_the_command_fetches_by_name_and_prints_the_files(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(REWARDS, "two", Two)
    assert main(["download", "two", "--folder", str(tmp_path), "--endpoint", hub.url]) == 0
    out = capsys.readouterr().out
    for file in Two.files:
        assert str(file_path(tmp_path, file).resolve()) in out
    assert "weights.pt (0.01 GB, MIT) from someone/things" in out


def test_the_command_knows_rewards_without_files_and_names_the_known_ones(capsys):
    assert main(["download", "colorfulness"]) == 0
    assert "needs no weights" in capsys.readouterr().out
    assert main(["download", "hpsv9"]) == 2
    assert "hpsv2.1" in capsys.readouterr().err
