"""Rewards that score a whole group at once: which images form a group, and what they return."""

import base64
import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from comfyui_pcpo.metrics.frechet import diversity
from comfyui_pcpo.reward import GroupReward, RewardError, RewardSettings
from comfyui_pcpo.reward.diversity import Diversity, TinyDiversity, mean_distance
from comfyui_pcpo.reward.service.endpoint import Vlm
from comfyui_pcpo.reward.service.pairwise import PairwiseVlm
from comfyui_pcpo.reward.service.server import RewardServer, ServerOptions
from comfyui_pcpo.reward.service.wire import Peer

torch.set_num_threads(1)


class Rank(GroupReward):
    """How many images of the group are darker; records the groups that it was given."""

    name = "rank"

    def __init__(self, settings=None):
        super().__init__(settings)
        self.seen = []

    def score_group(self, images, prompt):
        self.seen.append((prompt, len(images)))
        brightness = images.float().mean((1, 2, 3))
        return (brightness[:, None] > brightness).sum(1)


def grey(*values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 4, 4, 3).clone()


BATCH = grey(0.1, 0.3, 0.2, 0.9, 0.8, 0.7)


def test_a_group_is_scored_whole_whatever_images_at_once_is():
    reward = Rank(RewardSettings(images_at_once=1))
    assert reward.score(BATCH, ["a"] * 3 + ["b"] * 3, 3).tolist() == [0, 2, 1, 2, 1, 0]
    assert reward.seen == [("a", 3), ("b", 3)]


def test_groups_of_one_prompt_stay_apart_if_their_size_is_given():
    assert Rank().score(BATCH, ["a"] * 6, 3).tolist() == [0, 2, 1, 2, 1, 0]
    assert Rank().score(BATCH, ["a"] * 6).tolist() == [0, 2, 1, 5, 4, 3]


def test_without_a_size_consecutive_images_of_one_prompt_are_a_group():
    reward = Rank()
    reward.score(BATCH, ["a", "b", "b", "b", "a", "a"])
    assert reward.seen == [("a", 1), ("b", 3), ("a", 2)]


@pytest.mark.parametrize(
    ("prompts", "size", "said"),
    [(["a"] * 6, 4, "6 images in groups of 4"), (["a", "a", "b", "b", "b", "b"], 3, "0 to 2 form a group")],
)
def test_groups_that_do_not_fit_are_refused(prompts, size, said):
    with pytest.raises(RewardError, match=said):
        Rank().score(BATCH, prompts, size)


def test_an_image_of_nan_fails_alone():
    batch = BATCH.clone()
    batch[1] = torch.nan
    assert Rank().score(batch, ["a"] * 6, 3).isnan().tolist() == [False, True, False, False, False, False]


def test_the_class_must_define_score_group():
    with pytest.raises(RewardError, match="raised NotImplementedError: GroupReward does not define score_group"):
        GroupReward().score(BATCH, ["a"] * 6)


def test_a_reward_of_groups_is_not_served():
    with pytest.raises(RewardError, match="rank compares the images of a group"):
        RewardServer(Rank(), ServerOptions(token="x" * 16))


def test_mean_distance_by_hand():
    features = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    root = 0.5**0.5
    wanted = torch.tensor([1 - root / 2, 1 - root / 2, 1 - root])
    assert torch.allclose(mean_distance(features).float(), wanted)
    assert mean_distance(features[:1]).isnan().all()


def test_the_mean_of_diversity_is_the_metric():
    features = torch.randn(8, 5)
    scores = torch.cat([mean_distance(group) for group in features.split(4)])
    assert float(scores.mean()) == pytest.approx(diversity(features, 4), abs=1e-12)


def test_an_outlier_of_a_group_is_the_most_diverse():
    torch.manual_seed(0)
    batch = grey(0.5, 0.5, 0.5, 0.5).repeat(1, 16, 16, 1)
    batch[2] = torch.rand(64, 64, 3)
    scores = TinyDiversity(RewardSettings(images_at_once=3)).score(batch, ["a"] * 4, 4)
    assert scores.argmax() == 2 and torch.allclose(scores[[0, 1]], scores[[1, 3]])
    assert torch.allclose(scores, TinyDiversity().score(batch, ["a"] * 4, 4))


def test_diversity_needs_only_the_vision_tower(tmp_path):
    with pytest.raises(RewardError, match=r"reward diversity: .*vit_large_patch14_clip_224"):
        Diversity(RewardSettings(folder=tmp_path)).score(BATCH, ["a"] * 6, 3)


@pytest.fixture
def judge():
    """A VLM that prefers the brighter image, and adds `bias` to the first one; it fails for image pairs in `mute`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
            urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
            pngs = [io.BytesIO(base64.b64decode(url.partition(",")[2])) for url in urls]
            values = [Image.open(png).getpixel((0, 0))[0] for png in pngs]
            self.server.asked.append((*values, content[-1]["text"]))
            body = b"{}"
            if len(values) == 1 or tuple(sorted(values)) not in self.server.mute:
                first = (0.8 if values[0] > values[-1] else 0.2) + self.server.bias
                top = [{"token": str(n), "logprob": math.log(p)} for n, p in ((1, first), (2, 1 - first))]
                choice = {"message": {"content": "1"}, "logprobs": {"content": [{"top_logprobs": top}]}}
                body = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.mute, server.bias = [], set(), 0.1
    server.vlm = Vlm(Peer(f"http://127.0.0.1:{server.server_address[1]}/v1", patience=0), "m")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_pairwise_preferences_are_win_rates_without_the_models_bias(judge):
    scores = PairwiseVlm(vlm=judge.vlm).score(grey(0.2, 0.8, 0.4), ["a fox"] * 3, 3)
    assert scores.tolist() == pytest.approx([0.2, 0.8, 0.5])
    pairs = [entry for entry in judge.asked if len(entry) == 3]
    assert len(pairs) == 6 and all('"a fox"' in text for _, _, text in pairs)


def test_pairs_without_an_answer_are_left_out(judge):
    judge.mute = {(51, 204)}
    reward = PairwiseVlm(vlm=judge.vlm)
    scores = reward.measure(grey(0.2, 0.8, 0.4), ["a fox"] * 3, 3)
    assert scores.values.tolist() == pytest.approx([0.2, 0.8, 0.5])
    assert scores.extras["compared"] == ["1", "1", "2"] and "not a chat completion" in reward.failure
    judge.mute |= {(51, 102)}
    assert reward.score(grey(0.2, 0.8, 0.4), ["a fox"] * 3, 3).isnan().tolist() == [True, False, False]
