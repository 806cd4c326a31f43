"""Reward servers that fail: down, slow, dripping, dying, rejecting, and shut out by idle connections."""

import json
import logging
import socket
import threading
import time

import pytest
import torch

from comfyui_pcpo.reward import RewardError, RewardSettings, load_reward
from comfyui_pcpo.reward.service.remote import Remote, peer_from_environment
from comfyui_pcpo.reward.service.server import RewardServer, ServerOptions
from comfyui_pcpo.reward.service.wire import Peer, ServerUnavailable, ask
from trainer.config.schema import ConfigError
from trainer.runs.rewards import require_prompts

TOKEN = "0123456789abcdef-test"
IMAGES = torch.full((2, 8, 8, 3), 0.5)


class Interrupted(BaseException):
    """As ComfyUI's interrupt, not an Exception."""


def reply(body, status="200 OK", headers=""):
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n{body}".encode()


GOOD = reply(json.dumps({"rewards": [0.5]}))
TWO = reply(json.dumps({"rewards": [0.5, 0.25]}))


@pytest.fixture
def play():
    """play(behaviour) -> URL of a server whose connections are given to `behaviour(connection, number)`."""
    listeners = []

    def start(behaviour):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve():
            number = 0
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                number += 1
                threading.Thread(target=act, args=(connection, number), daemon=True).start()

        def act(connection, number):
            try:
                behaviour(connection, number)
            except OSError:
                pass
            finally:
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.close()


def read_request(connection):
    """Read one request whole."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-l")), 0
    )
    while len(body) < length:
        body += connection.recv(65536)


def answering(*answers):
    """A behaviour: one answer per connection, the last one for all others."""

    def behaviour(connection, number):
        read_request(connection)
        connection.sendall(answers[min(number, len(answers)) - 1])

    return behaviour


def hang(connection, number):
    read_request(connection)
    time.sleep(60)


def drip(connection, number):
    read_request(connection)
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def quick(url, **peer):
    return Peer(url, TOKEN, **({"timeout": 0.5, "patience": 0.3, "pause": 0.05} | peer))


@pytest.mark.parametrize("behaviour", [hang, drip])
def test_a_request_has_a_deadline_as_a_whole(play, behaviour):
    url, start = play(behaviour), time.monotonic()
    with pytest.raises(ServerUnavailable, match=r"http://.* answer.* It was tried for 0\.3 s"):
        ask(quick(url), "/info")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("behaviour", [hang, drip])
def test_waiting_is_interrupted_at_once(play, behaviour):
    start = time.monotonic()

    def tick():
        if time.monotonic() - start > 0.3:
            raise Interrupted

    with pytest.raises(Interrupted):
        ask(quick(play(behaviour), timeout=50.0), "/compute", {"prompts": [], "images": []}, tick)
    assert time.monotonic() - start < 20


def test_the_patience_is_interrupted_at_once():
    start = time.monotonic()

    def tick():
        if time.monotonic() - start > 0.3:
            raise Interrupted

    with pytest.raises(Interrupted):
        ask(Peer("http://127.0.0.1:1", patience=60, pause=30), "/info", tick=tick)
    assert time.monotonic() - start < 20


def test_an_outage_is_waited_out_with_a_line_that_tells_it(play, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("comfyui_pcpo"), "propagate", True)  # the command line's handler stops it
    broken = reply("starting", "503 Service Unavailable")
    url = play(answering(GOOD, broken, broken, b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\ncut", TWO))
    remote = Remote(RewardSettings(), quick(url, patience=10.0))
    remote.require_prompts(["a fox"])
    with caplog.at_level("WARNING"):
        assert remote.score(IMAGES, ["", ""]).tolist() == [0.5, 0.25]
    told = {record.getMessage() for record in caplog.records if "Waiting up to" in record.getMessage()}
    assert told == {f"{url}/compute answers with status 503: starting. Waiting up to 10 s for it."}


def test_after_an_outage_a_request_may_take_longer_than_the_patience(play):
    broken = reply("starting", "503 Service Unavailable")

    def slow(connection, number):
        connection.recv(1 << 16)
        if number == 1:
            connection.sendall(broken)
        else:
            time.sleep(1.5)
            connection.sendall(GOOD)

    assert ask(Peer(play(slow), patience=0.5, pause=0.01), "/info") == {"rewards": [0.5]}


def test_a_server_is_tried_once_before_the_first_image_and_without_patience(play):
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"reward remote: http://127.0.0.1:1 does not answer .* Start the server"):
        require_prompts({"remote": Remote(RewardSettings(), Peer("http://127.0.0.1:1", patience=60))}, ["a fox"])
    assert time.monotonic() - start < 20
    seen = []

    def count(connection, number):
        seen.append(number)
        answering(GOOD)(connection, number)

    reward = Remote(RewardSettings(), quick(play(count)))
    reward.require_prompts([])
    assert reward.load() is reward and seen == []
    for _ in range(2):
        reward.require_prompts(["a fox", "a frog"])
    assert seen == [1]
    assert reward.score(IMAGES[:1], ["a fox"]).tolist() == [0.5] and seen == [1, 2]


def test_the_first_scores_without_a_trial_are_not_waited_for():
    start = time.monotonic()
    with pytest.raises(ServerUnavailable, match="does not answer"):
        Remote(RewardSettings(), Peer("http://127.0.0.1:1", patience=60)).score(IMAGES, ["", ""])
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply("{}"), "no list of rewards for 1 images"),
        (reply('{"rewards": [1, 2]}'), "2 rewards for 1 images"),
        (reply('{"rewards": ["1"]}'), "rewards that are not numbers"),
        (reply("<html>"), "not JSON"),
        (reply("", "302 Found", "Location: http://elsewhere/\r\n"), "redirects to http://elsewhere/"),
        (
            reply('{"error": "no token"}', "401 Unauthorized"),
            'rejected the request with status 401: {"error": "no token"}',
        ),
        (reply("gone", "404 Not Found"), "status 404: gone"),
        (reply("oh no", "500 Internal Server Error"), "status 500: oh no"),
        (b"nonsense\r\n\r\n", "does not answer (BadStatusLine"),
        (b"", "does not answer (RemoteDisconnected"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "ended after 1 bytes"),
    ],
)
def test_a_wrong_answer_is_one_sentence_with_the_rewards_name_and_the_cause(play, answer, reason):
    with pytest.raises(ConfigError) as raised:
        require_prompts({"remote": Remote(RewardSettings(), quick(play(answering(answer))))}, ["a fox"])
    assert str(raised.value).startswith("reward remote: ") and reason in str(raised.value)


@pytest.mark.parametrize(
    ("status", "fix"),
    [
        ("400 Bad Request", "Fix the request, or check the address."),
        ("401 Unauthorized", "Fix the token."),
        ("403 Forbidden", "Fix the token."),
        ("422 Unprocessable Content", "Fix the prompt, or the server's reward."),
        ("429 Too Many Requests", "Read the server's log."),
        ("500 Internal Server Error", "Read the server's log."),
        ("503 Service Unavailable", "Start the server, or check its address."),
    ],
)
def test_an_error_ends_with_the_fix_that_its_status_calls_for(play, status, fix):
    with pytest.raises(RewardError, match=rf"status {status[:3]}: .*\. {fix}$"):
        ask(quick(play(answering(reply("why", status))), patience=0), "/info")


def test_a_server_that_rejects_a_large_body_before_reading_it_gives_its_reason(play):
    """Ours too: it reads what is left of a rejected request, so that its answer arrives."""
    server = RewardServer(load_reward("colorfulness"), ServerOptions(token=TOKEN))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        with pytest.raises(RewardError, match="status 401"):
            ask(Peer(server.url, "wrong", patience=0), "/compute", {"prompts": [""], "images": ["A" * 20_000_000]})
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "url",
    [
        "", "127.0.0.1:8000", "ftp://host", "http://", "http://:80", "http://host:port", "http://host:99999", "http://host:0",
        "http://[::1", "http://user:secret@host", "http://host/v1?key=1", "http://host#x", "http://ho st", "http://h\n",
        "http://h\u00f6st",
    ],
)  # fmt: skip
def test_malformed_addresses_are_refused(url):
    with pytest.raises(RewardError, match="is not a server address"):
        Peer(url)


def test_an_address_whose_host_cannot_exist_is_a_server_that_does_not_answer():
    with pytest.raises(ServerUnavailable, match="does not answer"):
        ask(Peer(f"http://{'a' * 80}..b", patience=0), "/info")


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "t\u00f6k\u00ebn-t\u00f6k\u00ebn-t\u00f6k\u00ebn"])
def test_tokens_that_no_header_can_carry_are_refused(token, monkeypatch):
    monkeypatch.setenv("PCPO_REWARD_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("PCPO_REWARD_TOKEN", token)
    with pytest.raises(RewardError, match=r"PCPO_REWARD_TOKEN.*visible ASCII"):
        peer_from_environment("REWARD")
    with pytest.raises(RewardError, match=r"PCPO_REWARD_TOKEN has|visible ASCII"):
        ServerOptions(token=token + "0123456789abcdef")


@pytest.fixture
def served():
    server = RewardServer(load_reward("colorfulness"), ServerOptions(token=TOKEN, timeout=0.6, max_strangers=8))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_idle_connections_shut_nobody_out_and_are_closed(served):
    idle = [socket.create_connection(served.server_address, timeout=5) for _ in range(40)]
    scores = Remote(RewardSettings(), Peer(served.url, TOKEN, patience=0, timeout=5)).score(IMAGES, ["", ""])
    assert scores.isfinite().all()
    assert idle[0].recv(10) == b""  # the oldest were closed for newer ones
    assert len(served.strangers.waiting) <= 8
    for connection in idle:
        connection.close()


def test_a_request_that_drips_is_ended_by_the_server(served):
    with socket.create_connection(served.server_address, timeout=5) as line:
        start = time.monotonic()
        head = f"POST /compute HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 1000\r\n\r\n"
        with pytest.raises(OSError):
            for byte in head.encode() + b" " * 1000:
                line.sendall(bytes([byte]))
                time.sleep(0.02)
        assert time.monotonic() - start < 20
