"""Rewards of servers score while the policy samples: the same calls, scores and updates, in less time."""

import json
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from comfyui_pcpo.reward import GroupReward, RewardError
from comfyui_pcpo.reward.color import Colorfulness
from comfyui_pcpo.reward.service.images import decode_png
from comfyui_pcpo.reward.service.remote import Remote
from comfyui_pcpo.reward.service.wire import Peer

pytestmark = pytest.mark.slow
DELAY = 0.3  # seconds of each request


@pytest.fixture
def slow():
    """A reward server that takes DELAY per request, and scores colourfulness."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(self.server.delay)
            arrays = [torch.from_numpy(decode_png(png, 10**6))[None] for png in sent["images"]]
            scores = [float(Colorfulness().score_batch(image, [""])) for image in arrays]
            body = json.dumps({"rewards": scores}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.delay = DELAY
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    remote = Remote(peer=Peer(f"http://127.0.0.1:{server.server_address[1]}", "t" * 16, patience=0))
    remote.server = server
    yield remote
    server.shutdown()
    server.server_close()


class Ranks(GroupReward):
    """How many images of the group are less colourful, told from elsewhere; records its calls."""

    name, elsewhere = "ranks", True

    def __init__(self):
        super().__init__()
        self.calls = []

    def score_group(self, images, prompt):
        self.calls.append((prompt, images.float().mean((1, 2, 3)).tolist()))
        scores = Colorfulness().score_batch(images, [prompt] * len(images))
        return (scores[:, None] > scores).sum(1)


def two_chunks(make_config, overlap, **reward):
    return make_config(
        rollout={"prompts_per_update": 2, "group_size": 4, "steps": 6, "images_at_once": 2},
        optimizer={"minibatches": 2},
        reward={"weights": {"colorfulness": 1.0}, "overlap": overlap, **reward},
        run={"updates": 2},
    )


def trained(config, learn, rewards):
    state, updates = learn(config, rewards=rewards)
    done = list(updates)
    return [p.detach().clone() for p in state.policy.trainable()], done


def test_a_thread_changes_no_bit_and_saves_the_time_of_requests(make_config, learn, slow):
    one, before = trained(two_chunks(make_config, False), learn, {"colorfulness": slow})
    two, after = trained(two_chunks(make_config, True), learn, {"colorfulness": slow})
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for left, right in zip(before, after, strict=True):
        assert torch.equal(left.scores, right.scores) and torch.equal(left.images, right.images)
        assert left.metrics["seconds_saved"] == 0
        assert right.metrics["seconds_saved"] > DELAY / 2  # of 4 requests, at most the last ones are waited for
        assert right.metrics["seconds_reward"] < left.metrics["seconds_reward"]
        assert right.metrics["seconds_rewards"]["colorfulness"] >= 4 * DELAY


def test_scores_equal_those_of_the_same_reward_in_process(make_config, learn, slow):
    _, (theirs, *_) = trained(two_chunks(make_config, True), learn, {"colorfulness": slow})
    _, (ours, *_) = trained(two_chunks(make_config, True), learn, {"colorfulness": Colorfulness()})
    assert torch.allclose(theirs.scores, ours.scores, atol=1e-4)
    assert "seconds_saved" not in ours.metrics


@pytest.mark.parametrize("overlap", [True, False])
def test_a_group_reward_is_called_once_per_whole_group(make_config, learn, overlap):
    ranks = Ranks()
    _, updates = trained(two_chunks(make_config, overlap), learn, {"colorfulness": ranks})
    assert len(ranks.calls) == 4
    groups = [group for update in updates for group in update.images.split(4)]
    for (_, means), group in zip(ranks.calls, groups, strict=True):
        assert means == pytest.approx((group * 255).round().mean((1, 2, 3)).tolist())
    assert all(sorted(group.tolist()) == [0, 1, 2, 3] for update in updates for group in update.scores.split(4))


class Broken(Colorfulness):
    elsewhere = True

    def score_batch(self, images, prompts):
        raise ZeroDivisionError("no scale")


@pytest.mark.parametrize("overlap", [True, False])
def test_what_a_reward_raises_in_its_thread_ends_the_update_as_if_it_were_here(make_config, learn, overlap):
    state, updates = learn(two_chunks(make_config, overlap), rewards={"colorfulness": Broken()})
    with pytest.raises(RewardError, match="raised ZeroDivisionError: no scale"):
        next(updates)
    assert state.done == 0


def test_an_interrupt_does_not_wait_for_requests(make_config, learn, slow):
    """The tick raises while the first request runs."""
    calls = []

    def tick():
        calls.append(1)
        if len(calls) == 9:  # in the second chunk of 6 steps
            raise KeyboardInterrupt

    slow.tried, slow.server.delay = True, 60.0
    state, updates = learn(two_chunks(make_config, True), tick, {"colorfulness": slow})
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        next(updates)
    assert time.perf_counter() - start < 60
    assert len(calls) == 9 and state.done == 0


def test_waiting_for_a_server_is_no_model_call(make_config, learn, slow):
    config, ticks, waits = two_chunks(make_config, True), {slow: [], Colorfulness(): []}, []
    for reward, calls in ticks.items():
        tick, waiting = partial(calls.append, 1), partial(waits.append, 1)
        list(learn(config, tick, {"colorfulness": reward}, waiting=waiting)[1])
    served, here = map(len, ticks.values())
    assert served == here and waits


def test_a_host_can_end_the_wait_for_a_server(make_config, learn, slow):
    def waiting():
        raise KeyboardInterrupt

    slow.tried, slow.server.delay = True, 60.0
    state, updates = learn(two_chunks(make_config, True), rewards={"colorfulness": slow}, waiting=waiting)
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        next(updates)
    assert time.perf_counter() - start < 60 and state.done == 0
