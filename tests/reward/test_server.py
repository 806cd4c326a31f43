"""A reward behind a server on loopback: equal scores, many clients, a lost server, and requests that are refused."""

import base64
import http.client
import io
import json
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_pcpo.reward import Prompt, Reward, RewardError, RewardSettings, load_reward, metadata_of
from comfyui_pcpo.reward.service.images import decode_png, encode_png
from comfyui_pcpo.reward.service.remote import Remote, decode_scores
from comfyui_pcpo.reward.service.server import RewardServer, ServerOptions
from comfyui_pcpo.reward.service.wire import BadAnswer, Peer, ServerUnavailable, ask

torch.set_num_threads(1)
TOKEN = "0123456789abcdef-test"


class Moody(Reward):
    """Redness of the first pixel; fails, or raises, when the prompt says so."""

    name = "moody"

    def score_batch(self, images, prompts):
        if "raise" in prompts:
            raise ZeroDivisionError
        scores = images[:, 0, 0, 0].float()
        return scores.masked_fill(torch.tensor([prompt == "fail" for prompt in prompts]), float("nan"))


@pytest.fixture
def serve():
    """Starts servers, and stops those that still run."""
    running = []

    def start(reward, **options):
        server = RewardServer(reward, ServerOptions(token=TOKEN, **options))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def client(url, **peer):
    return Remote(
        RewardSettings(images_at_once=8), Peer(url, TOKEN, **({"pause": 0.01, "timeout": 10.0, "patience": 0.2} | peer))
    )


def images(count, size=16):
    return torch.linspace(0, 1, count)[:, None, None, None].expand(-1, size, size, 3)


def post(server, body, token=TOKEN, headers=None, path="/compute"):
    """Status and JSON of one raw request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    headers = {"Authorization": f"Bearer {token}"} | (headers or {})
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    reply = answer.status, json.loads(answer.read())
    connection.close()
    return reply


def test_remote_scores_equal_local_ones(serve):
    local = load_reward("colorfulness")
    batch = torch.rand(20, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    remote = client(serve(local).url)
    assert torch.equal(remote.score(batch, [""] * 20), local.score(batch, [""] * 20))
    assert remote.is_healthy()
    assert remote.info() == {
        "name": "colorfulness",
        "needs_prompt": False,
        "typical_range": [0.0, 1.2],
    }


def test_failed_scores_travel_as_null(serve):
    scores = client(serve(Moody()).url).score(images(3), ["a", "fail", "b"])
    assert scores.isnan().tolist() == [False, True, False]


def test_a_served_reward_that_needs_a_prompt_scores_as_a_local_one(serve):
    """Such as TinyEval, which scores nothing without a scene in the prompt; so the server is tried with a real one."""
    local, remote = load_reward("tinyeval"), client(serve(load_reward("tinyeval")).url)
    batch = torch.rand(3, 96, 96, 3, generator=torch.Generator().manual_seed(0))
    prompts = ["a fox", "two foxes", "a star above a house"]
    remote.require_prompts(prompts)
    torch.testing.assert_close(remote.load().score(batch, prompts), local.score(batch, prompts))
    with pytest.raises(RewardError, match=r"status 422.*the Eiffel Tower.*Fix the prompt, or the server's reward\.$"):
        client(serve(load_reward("tinyeval")).url).require_prompts(["the Eiffel Tower"])


def test_eight_clients_at_once_get_their_own_scores(serve):
    url = serve(Moody()).url
    count = 63  # 8 clients x 63 = 504 images

    def work(n):
        batch = ((torch.arange(count) * 4 + n) % 256)[:, None, None, None].expand(-1, 8, 8, 3) / 255
        return client(url).score(batch, [""] * count), (torch.arange(count) * 4 + n) % 256

    with ThreadPoolExecutor(8) as pool:
        for scores, expected in pool.map(work, range(8)):
            assert torch.equal(scores, expected.float())


def test_a_server_that_dies_is_named_after_the_patience(serve):
    server = serve(Moody())
    remote = client(server.url, timeout=1.0)
    assert remote.score(images(4), [""] * 4).isfinite().all()
    server.shutdown()
    server.server_close()
    with pytest.raises(ServerUnavailable, match=r"reward remote: http://127.*ConnectionRefused.*tried for 0\.2 s"):
        remote.score(images(4), [""] * 4)
    assert not remote.is_healthy()


def test_a_reward_that_raises_costs_the_request_and_not_the_server(serve):
    remote = client(serve(Moody()).url)
    with pytest.raises(RewardError, match=r"status 422.*reward moody raised ZeroDivisionError \(test_server.py, line"):
        remote.score(images(2), ["raise", "a"])
    assert remote.score(images(2), ["a", "a"]).isfinite().all()


class Behind(Reward):
    """A reward whose own server is away for some requests."""

    name = "behind"
    away = 0

    def score_batch(self, images, prompts):
        self.away -= 1
        if self.away >= 0:
            raise ServerUnavailable("http://elsewhere does not answer.")
        return torch.ones(len(images))


def test_an_outage_behind_a_served_reward_is_waited_out(serve):
    reward = Behind()
    server = serve(reward)
    remote = client(server.url, patience=10.0)
    assert remote.score(images(1), [""]).tolist() == [1]
    reward.away = 2
    body = json.dumps({"prompts": [""], "images": [encode_png(np.zeros((4, 4, 3), np.uint8))]})
    status, answer = post(server, body)
    assert status == 503 and "http://elsewhere does not answer" in answer["error"]
    assert remote.score(images(1), [""]).tolist() == [1] and reward.away < 0


def test_without_the_token_only_health_is_told(serve):
    server = serve(Moody())
    stranger = Remote(peer=Peer(server.url, "wrong"))
    assert stranger.is_healthy()
    for attempt in (lambda: stranger.score(images(1), [""]), stranger.info):
        with pytest.raises(RewardError, match="status 401"):
            attempt()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[1, 2]",
        b"[" * 100_000,
        b'{"prompts": [""]}',
        b'{"prompts": "a", "images": ["a"]}',
        b'{"prompts": [1], "images": ["a"]}',
        b'{"prompts": ["a"], "images": [{"path": "/etc/passwd"}]}',
        b'{"prompts": ["a", "b"], "images": ["a"]}',
        b'{"prompts": ["a"], "images": ["no base64!"]}',
        b'{"prompts": ["a"], "images": ["aGVsbG8="]}',
        b'{"prompts": [], "images": [], "code": "x"}',
    ],
)
def test_wrong_requests_are_refused_and_the_server_goes_on(body, serve):
    server = serve(Moody())
    status, answer = post(server, body)
    assert status == 400 and answer["error"]
    assert client(server.url).score(images(1), [""]).isfinite().all()


def test_too_much_is_refused_before_it_is_read(serve):
    server = serve(Moody(), max_bytes=10_000, max_images=2)
    image = encode_png(np.zeros((4, 4, 3), np.uint8))
    assert post(server, json.dumps({"prompts": [""] * 3, "images": [image] * 3}))[0] == 413
    assert post(server, b"", headers={"Content-Length": "99999999999999999999999"})[0] == 413
    assert post(server, b"", headers={"Content-Length": "0" * 20 + "99999999999"})[0] == 413
    assert post(server, b"", headers={"Content-Length": "-5"})[0] == 411
    assert post(server, b"", path="/other")[0] == 404


def test_a_body_that_never_comes_does_not_hold_the_server(serve):
    server = serve(Moody(), timeout=0.2)
    with socket.create_connection(server.server_address, timeout=5) as line:
        line.sendall(f"POST /compute HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 9\r\n\r\n".encode())
        assert b" 408 " in line.recv(1000)
    with socket.create_connection(server.server_address, timeout=5) as line:
        line.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves with a reset
    assert client(server.url).is_healthy()


def bomb(width, height):
    """A PNG that is small as a file and claims to be huge."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [5000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(side, serve):
    image = base64.b64encode(bomb(side, side)).decode()
    status, answer = post(serve(Moody()), json.dumps({"prompts": [""], "images": [image]}))
    assert status == 400 and ("pixels" in answer["error"] or "cannot be read" in answer["error"])


def test_images_that_unpack_to_too_much_together_are_refused_by_their_headers(serve):
    server = serve(Moody(), max_total_pixels=100)
    huge = base64.b64encode(bomb(4000, 4000)).decode()  # unpacking it would be refused as what cannot be read
    status, answer = post(serve(Moody()), json.dumps({"prompts": [""] * 9, "images": [huge] * 9}))
    assert status == 413
    assert "9 images have 144000000 pixels, but at most 134217728" in answer["error"]
    assert "images_at_once" in answer["error"]
    image = encode_png(np.zeros((5, 10, 3), np.uint8))
    assert post(server, json.dumps({"prompts": [""] * 3, "images": [image] * 3}))[0] == 413
    assert post(server, json.dumps({"prompts": [""] * 2, "images": [image] * 2}))[0] == 200


def test_the_reward_is_given_as_many_images_as_it_takes_at_once(serve):
    class Counting(Moody):
        def score(self, images, prompts):
            given.append(len(images))
            return super().score(images, prompts)

    given = []
    images = [encode_png(np.full((4 + n % 2, 4, 3), n, np.uint8)) for n in range(7)]
    server = serve(Counting(RewardSettings(images_at_once=3)))
    assert post(server, json.dumps({"prompts": [""] * 7, "images": images}))[1]["rewards"] == list(range(7))
    assert given == [3, 1, 3]  # four of one size, three of the other


def test_an_image_whose_pixels_are_broken_is_refused_though_its_header_is_whole(serve):
    images = [encode_png(np.zeros((4, 4, 3), np.uint8)), base64.b64encode(bomb(4, 4)).decode()]
    status, answer = post(serve(Moody()), json.dumps({"prompts": [""] * 2, "images": images}))
    assert status == 400 and "cannot be read" in answer["error"]


@pytest.mark.parametrize(("host", "usual"), [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::1", "::1")])
def test_the_address_that_a_server_tells_is_one_that_clients_reach(host, usual, serve):
    try:
        server = serve(Moody(), host=host)
    except OSError as error:
        pytest.skip(f"{host} cannot be listened on here: {error}")
    assert urlsplit(server.url).hostname not in ("0.0.0.0", "::")
    usual = f"[{usual}]" if ":" in usual else usual
    for url in (server.url, f"http://{usual}:{server.server_address[1]}"):
        assert client(url, patience=0).score(images(2), [""] * 2).isfinite().all()
    assert server.is_everywhere == (host != "::1")


def test_only_png_is_opened_and_other_modes_become_rgb():
    def encoded(mode, kind):
        file = io.BytesIO()
        Image.new(mode, (4, 2), 0).save(file, format=kind)
        return base64.b64encode(file.getvalue()).decode()

    with pytest.raises(RewardError, match="base64 of a PNG"):
        decode_png(encoded("RGB", "JPEG"), 100)
    for mode in ("RGBA", "L", "P", "1", "I;16"):
        assert decode_png(encoded(mode, "PNG"), 100).shape == (2, 4, 3)


def test_a_grey_image_of_16_bits_keeps_its_values():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(file, format="PNG")
    pixels = decode_png(base64.b64encode(file.getvalue()).decode(), 100)
    assert pixels.tolist() == [[[value] * 3 for value in (0, 1, 128, 255)]]


def test_images_of_several_sizes_keep_their_order(serve):
    images = [encode_png(np.full((4 + n % 2, 4, 3), n, np.uint8)) for n in range(5)]
    status, answer = post(serve(Moody()), json.dumps({"prompts": [""] * 5, "images": images}))
    assert status == 200 and answer["rewards"] == [0, 1, 2, 3, 4]


def test_answers_that_are_not_rewards_count_as_none():
    for answer in ([], {"rewards": [1]}, {"rewards": ["1", "2"]}, {"rewards": [True, 1]}):
        with pytest.raises(BadAnswer):
            decode_scores(answer, 2)
    assert decode_scores({"rewards": [1, None]}, 2).isnan().tolist() == [False, True]


def test_addresses_and_tokens_come_from_the_environment(monkeypatch):
    monkeypatch.delenv("PCPO_REWARD_URL", raising=False)
    with pytest.raises(RewardError, match="PCPO_REWARD_URL is not set"):
        load_reward("remote")
    monkeypatch.setenv("PCPO_REWARD_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("PCPO_REWARD_TOKEN", "short")
    assert load_reward("remote").peer.token == "short"
    assert "short" not in repr(load_reward("remote").peer)
    with pytest.raises(RewardError, match="5 characters"):
        ServerOptions()
    with pytest.raises(RewardError, match="not a server address"):
        Peer("file:///etc/passwd")
    with pytest.raises(ServerUnavailable, match="does not answer"):
        ask(Peer("https://127.0.0.1:1/v1", patience=0, timeout=1), "/info")


class Counting(Reward):
    """The count that the metadata asks for."""

    name = "counting"

    def score_batch(self, images, prompts):
        return torch.tensor([float(metadata_of(prompt).get("count", -1)) for prompt in prompts])


def test_metadata_of_prompts_reaches_the_server(serve):
    prompts = [Prompt("two foxes", {"count": 2}), "a fox"]
    assert client(serve(Counting()).url).score(images(2), prompts).tolist() == [2, -1]


def test_a_server_is_tried_with_the_metadata_and_the_plain_text_of_the_first_prompt(serve):
    class Picky(Counting):
        def score_batch(self, images, prompts):
            seen.extend((str(prompt), metadata_of(prompt)["count"]) for prompt in prompts)
            return super().score_batch(images, prompts)

    seen = []
    remote = Remote(RewardSettings(plain=str.lower), Peer(serve(Picky()).url, TOKEN, patience=0))
    remote.require_prompts([Prompt("Two foxes", {"count": 2}), "a fox"])
    assert seen == [("two foxes", 2)]


@pytest.mark.parametrize("metadata", [[{}], ["x", "y"], {}, 1])
def test_metadata_that_is_not_an_object_per_prompt_is_refused(serve, metadata):
    png = encode_png(np.zeros((8, 8, 3), np.uint8))
    body = json.dumps({"prompts": ["", ""], "images": [png, png], "metadata": metadata})
    status, reply = post(serve(Counting()), body)
    assert status == 400 and "metadata must be a list of one object per prompt" in reply["error"]
