"""Blind comparison: sides are hidden and shuffled, votes go to the right side, the interval is Wilson's."""

import io
import json
import socket
import struct
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from comfyui_pcpo.taste.blind import blind_pairs, sentence, win_rate
from comfyui_pcpo.taste.human import Question, Reply
from comfyui_pcpo.taste.votes import VoteError
from trainer.cli import main
from trainer.evaluation.ballot_page import BallotServer
from trainer.evaluation.blind import is_image_folder


def sides(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(count, 4, 4, 3), torch.ones(count, 4, 4, 3)


def prefers_white(images: torch.Tensor) -> tuple[int, int]:
    return (0, 1) if images[0].float().mean() > images[1].float().mean() else (1, 0)


def test_the_preferred_side_wins_whichever_place_it_has():
    pairs = blind_pairs(*sides(), 0, seed=3)
    assert {pair.swapped for pair in pairs} == {True, False} and sorted(pair.row for pair in pairs) == list(range(40))
    assert [pair.row for pair in pairs] != list(range(40))
    assert all(pair.win_of_b(prefers_white(pair.images)) == 1 for pair in pairs)
    swapped = blind_pairs(*sides()[::-1], 0, seed=3)
    assert all(pair.win_of_b(prefers_white(pair.images)) == 0 for pair in swapped)
    assert pairs[0].win_of_b(()) == pairs[0].win_of_b((0, 0)) == 0.5


def test_sides_of_different_number_or_size_are_refused():
    with pytest.raises(VoteError, match="Side A has 2 images of 4 x 4, side B 3 of 4 x 4"):
        blind_pairs(torch.zeros(2, 4, 4, 3), torch.zeros(3, 4, 4, 3), 0, 0)


@pytest.mark.parametrize(("wins", "votes"), [(0, 10), (3, 10), (10, 10), (55, 100)])
def test_the_interval_is_wilsons(wins, votes):
    expected = binomtest(wins, votes).proportion_ci(0.95, "wilson")
    rate = win_rate([1.0] * wins + [0.0] * (votes - wins))
    assert (rate.rate, rate.low, rate.high) == pytest.approx((wins / votes, expected.low, expected.high))


def test_the_result_in_words():
    assert sentence(win_rate([1.0] * 19 + [0.5])) == (
        "B wins 98 % (95 % interval 80 to 100 %) of 20 pairs, 1 ties: B is preferred."
    )
    assert sentence(win_rate([1.0, 0.0])).endswith("no clear preference.")
    with pytest.raises(VoteError, match="No pair was voted on"):
        win_rate([])


class Page:
    """A client of the page's routes, as a browser is."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return response.read()

    def post(self, path: str, body: object, **headers: str) -> tuple[int, dict]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def question(self) -> dict:
        for _ in range(200):
            tree = json.loads(self.get("/vote"))
            if tree["open"]:
                return tree
            threading.Event().wait(0.02)
        raise AssertionError("no question opened")


@pytest.fixture
def server():
    server = BallotServer()
    with server.serving():
        yield server


def asked(server: BallotServer, question: Question) -> tuple[threading.Thread, list[Reply]]:
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(server.ask(question)), daemon=True)
    thread.start()
    return thread, replies


def group(choose: str = "ranking", **settings) -> Question:
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 4, 5, 3).contiguous()
    return Question("Best?", "a fox", images, choose, 1, 9, **{"can_undo": False, "can_finish": False, **settings})


def test_the_page_shows_the_question_and_hands_over_the_answer(server):
    thread, replies = asked(server, group())
    page = Page(server.url)
    assert b"ballot.js" in page.get("/") and b"class Ballot" in page.get("/ballot.js")
    tree = page.question()
    assert (tree["question"], tree["prompt"], tree["number"], tree["total"]) == ("Best?", "a fox", 1, 9)
    assert page.get(tree["images"][2])[:4] == b"\x89PNG"
    assert page.post(f"/vote/{tree['id']}", {"ranks": [2, 0, 1], "seconds": 1.5}) == (200, {"accepted": True})
    thread.join(5)
    assert replies == [Reply("vote", (2, 0, 1), 1.5)] and json.loads(page.get("/vote")) == {"open": False}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"ranks": [0, 1]}, "a group of 3 images needs 3 whole numbers"),
        ({"ranks": "012"}, "no list of ranks"),
        ({}, "no list of ranks"),
        ([], "not a JSON object"),
        ({"action": "undo"}, "Use one of vote, skip."),
        ({"action": ["finish"]}, "Use one of vote, skip."),
        (b"{", "Expecting property name"),
    ],
)
def test_a_bad_answer_is_explained_and_the_question_stays_open(server, body, message):
    thread, replies = asked(server, group())
    page = Page(server.url)
    key = page.question()["id"]
    status, reply = page.post(f"/vote/{key}", body)
    assert status == 400 and message in reply["error"] and thread.is_alive()
    page.post(f"/vote/{key}", {"action": "skip"})
    thread.join(5)
    assert replies == [Reply("vote", ())]


def test_a_page_that_is_closed_while_it_loads_leaves_no_traceback(server, capfd):
    thread, _ = asked(server, group())
    for _ in range(3):
        client = socket.create_connection(("127.0.0.1", server.server_port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # its close is a reset
        client.sendall(b"GET /vote HTTP/1.1\r\n")
        client.close()
    Page(server.url).question()
    assert thread.is_alive() and capfd.readouterr().err == ""


def test_a_late_answer_another_page_and_a_long_one_are_refused(server):
    thread, _ = asked(server, group())
    page = Page(server.url)
    key = page.question()["id"]
    assert page.post("/vote/0123", {"ranks": [0, 1, 2]})[0] == 409
    assert page.post(f"/vote/{key}", {"ranks": [0, 1, 2]}, Origin="http://example.org")[0] == 403
    assert page.post(f"/vote/{key}", b"x" * 200_000)[0] == 403
    with pytest.raises(urllib.error.HTTPError, match="404"):
        page.get(f"/vote/{key}/3.png")
    page.post(f"/vote/{key}", {"ranks": [0, 1, 2]})
    thread.join(5)


def test_ab_compares_two_folders_and_writes_the_votes(tmp_path, capsys):
    for name, value in (("a", 0), ("b", 255)):
        (tmp_path / name).mkdir()
        for n in range(6):
            Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / name / f"{n}.png")
    port = free_port()
    out = tmp_path / "ab.json"
    command = ["ab", str(tmp_path / "a"), str(tmp_path / "b"), "--port", str(port), "--out", str(out)]
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(main.main(command)), daemon=True)
    thread.start()
    page = Page(f"http://127.0.0.1:{port}")
    answered = 0
    undone = False
    for _ in range(1000):
        if answered == 6 or not thread.is_alive():
            break
        try:
            tree = page.question()
        except OSError:  # not listening yet
            threading.Event().wait(0.05)
            continue
        if answered == 3 and not undone:
            undone = page.post(f"/vote/{tree['id']}", {"action": "undo"})[0] == 200
            answered -= 1
            continue
        whites = [np.asarray(Image.open(io.BytesIO(page.get(url)))).mean() > 100 for url in tree["images"]]
        ranks = [0 if white else 1 for white in whites]
        answered += page.post(f"/vote/{tree['id']}", {"ranks": ranks})[0] == 200
    thread.join(20)
    result = json.loads(out.read_text())
    assert status == [0] and result["rate"] == 1 and result["votes"] == 6
    assert sorted(vote["pair"] for vote in result["pairs"]) == list(range(6))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_run_is_sampled_and_images_in_subfolders_are_shown(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "seeds" / "0").mkdir(parents=True)
    for place in ("run/curves.png", "seeds/0/a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    (tmp_path / "run" / "config.toml").write_text("")
    assert is_image_folder(tmp_path / "seeds") and not is_image_folder(tmp_path / "run")


def test_ab_needs_prompts_for_models_and_a_json_file(tmp_path, capsys):
    assert main.main(["ab", "emoji-flow", "emoji-flow", "--out", str(tmp_path / "x.json")]) == 2
    assert "there are no prompts. Give --prompt" in capsys.readouterr().err
    assert main.main(["ab", "a", "b", "--out", str(tmp_path / "x.txt")]) == 2
    assert "must be a file that ends in .json" in capsys.readouterr().err
    assert not list(Path(tmp_path).iterdir())
