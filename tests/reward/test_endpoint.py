"""Rewards that ask a vision-language model: a small server plays the model, the rest is real."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from comfyui_pcpo.reward import RewardError, RewardSettings, load_reward
from comfyui_pcpo.reward.base import RewardFile
from comfyui_pcpo.reward.bertscore import HUB_ID, BertScore, Embedded, recall
from comfyui_pcpo.reward.service.endpoint import EndpointReward, Vlm, VlmRating, VlmYes, only_number, yes_share
from comfyui_pcpo.reward.service.judges import UnifiedReward, VqaScore, final_score
from comfyui_pcpo.reward.service.wire import BadAnswer, Peer
from comfyui_pcpo.reward.weights.checkpoint import file_path
from comfyui_pcpo.reward.weights.tokens import BERT_VOCABULARY

torch.set_num_threads(1)
GREY = torch.full((1, 8, 8, 3), 0.5)


@pytest.fixture
def model():
    """A chat-completions endpoint that replies with `answers` and records its requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.server.headers.append(self.headers["Authorization"])
            body = self.server.answer
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.headers, server.answer = [], [], b"{}"
    server.vlm = Vlm(
        Peer(f"http://127.0.0.1:{server.server_address[1]}/v1", "secret", patience=0, timeout=5), "tiny-vlm"
    )
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def says(text, **likely):
    top = [{"token": token, "logprob": math.log(p)} for token, p in likely.items()]
    choice = {"message": {"content": text}, "logprobs": {"content": [{"top_logprobs": top}]}}
    return json.dumps({"choices": [choice]}).encode()


def test_yes_is_weighed_against_no(model):
    model.answer = says("Yes", Yes=0.5, yes=0.1, no=0.2, maybe=0.2)
    scores = VlmYes(vlm=model.vlm).measure(GREY, ["a fox"])
    assert scores.values.item() == pytest.approx(0.6 / 0.8)
    assert scores.extras == {"answer": ["Yes"]}
    content = model.asked[-1]["messages"][0]["content"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,") and '"a fox"' in content[1]["text"]
    assert set(model.headers) == {"Bearer secret"} and model.asked[-1]["logprobs"] is True


def test_a_rating_is_the_one_number_of_the_answer(model):
    model.answer = says("8.5 out of 10")
    assert VlmRating(vlm=model.vlm).score(GREY, ["a fox"]).item() == pytest.approx(0.85)
    for text, value in {"7": 7, "Rating: 8/10.": 8, "10 / 10": 10, "9 (out of 10)": 9, "**6.5**": 6.5}.items():
        assert only_number(text, 10) == value
    for text in ("none", "11", "-1", "", "On a scale of 0 to 10: 7", "0-10: 9", "7,5", "7 or 8"):
        assert math.isnan(only_number(text, 10))


def test_answers_without_probabilities_fail():
    for logprobs in (None, {}, {"content": []}, {"content": [{"top_logprobs": [{"token": "maybe", "logprob": -1}]}]}):
        assert math.isnan(yes_share(logprobs))


def test_vqascore_is_the_probability_of_yes_in_the_published_words(model):
    model.answer = says("Yes", Yes=0.5, yes=0.1, No=0.2)
    assert VqaScore(vlm=model.vlm).score(GREY, ["a fox"]).item() == pytest.approx(0.5)
    text = model.asked[-1]["messages"][0]["content"][1]["text"]
    assert text == 'Does this figure show "a fox"? Please answer yes or no.'
    model.answer = says("No", No=0.9)
    assert VqaScore(vlm=model.vlm).score(GREY, ["a fox"]).item() == 0


def test_vqascore_of_a_model_that_thinks_first_fails_with_the_reason(model):
    model.answer = says("<think>", **{"<think>": 0.99})
    reward = VqaScore(vlm=model.vlm)
    assert reward.score(GREY, ["a fox"]).isnan().all()
    assert "'<think>' without log-probabilities of yes or no" in reward.failure


def test_unifiedreward_reads_the_final_score_of_its_own_question(model):
    model.answer = says("Alignment is 3, quality 2.\n**Final Score:** 4.5")
    reward = UnifiedReward(vlm=model.vlm)
    assert reward.score(GREY, ["a {fox}"]).item() == pytest.approx(0.9)
    text = model.asked[-1]["messages"][0]["content"][1]["text"]
    assert text.endswith("Text Caption: [a {fox}]") and "assign a score from 1 to 5 after 'Final Score:'." in text
    for answer in ("Final Score (1-5): 4", "final score: 4/5", "Final Score: 2. No, **Final Score**: 4"):
        assert final_score(answer, 5) == 4
    for answer in ("4", "Final Score: 9", "Final Score: 0.5", "Final Score: -3", "Final Score: 4,5", ""):
        assert math.isnan(final_score(answer, 5))


@pytest.mark.parametrize("answer", [b"{}", b"no json", b'{"choices": [{}]}', b"[]"])
def test_an_endpoint_that_talks_nonsense_is_refused_at_its_trial_and_fails_the_sample_later(answer, model):
    model.answer = answer
    with pytest.raises(BadAnswer, match="reward vlm_rating: the answer"):
        VlmRating(vlm=model.vlm).load()
    model.answer, reward = says("8"), VlmRating(vlm=model.vlm)
    assert reward.score(GREY, ["a fox"]).item() == pytest.approx(0.8)
    model.answer = answer
    assert reward.score(GREY, ["a fox"]).isnan().all()
    assert "the answer" in reward.failure


def test_an_answer_without_a_score_is_the_reason_of_the_failure(model):
    model.answer, reward = says("I cannot tell"), VlmRating(vlm=model.vlm)
    assert reward.score(GREY, ["a fox"]).isnan().all()
    assert reward.failure == "the model answered 'I cannot tell' without a number from 0 to 10"


def test_models_come_from_the_environment(monkeypatch):
    monkeypatch.delenv("PCPO_VLM_MODEL", raising=False)
    with pytest.raises(RewardError, match="PCPO_VLM_MODEL is not set"):
        load_reward("vlm_yes")
    monkeypatch.setenv("PCPO_VLM_MODEL", "m")
    monkeypatch.setenv("PCPO_VLM_URL", "http://127.0.0.1:1/v1")
    reward = load_reward("vlm_rating")
    assert isinstance(reward, EndpointReward) and reward.vlm.model == "m"


def test_an_endpoint_reward_without_score_image_is_named(model):
    model.answer = says("")
    with pytest.raises(RewardError, match="raised NotImplementedError: EndpointReward does not define score_image"):
        EndpointReward(vlm=model.vlm).score(GREY, [""])


def test_recall_by_hand():
    x, y = torch.eye(2)
    reference = Embedded(torch.stack([x, y, x]), torch.tensor([False, True, True]))
    candidate = Embedded(torch.stack([x, (x + y) / 2**0.5]), torch.tensor([False, True]))
    assert recall(reference, candidate) == pytest.approx((0.5**0.5 + 1) / 2)  # y against x + y, x against x


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT in the place of DeBERTa: BERTScore takes any encoder."""
    from transformers import BertConfig, BertModel, BertTokenizer

    root = tmp_path_factory.mktemp("weights")
    place = file_path(root, BertScore.files[0]).parent
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=30522, **sizes)).save_pretrained(place)
    lines = BERT_VOCABULARY.read_text(encoding="utf-8").splitlines()
    BertTokenizer(vocab={token: n for n, token in enumerate(lines)}).save_pretrained(place)
    return root


class TinyBertScore(BertScore):
    files = tuple(RewardFile(HUB_ID, name, 1000, "none") for name in ("model.safetensors", "config.json"))
    layer = 2


def test_the_same_words_have_full_recall_and_others_less(folder, model):
    reward = TinyBertScore(RewardSettings(folder=folder), model.vlm)
    model.answer = says("The image contains a red fox")
    assert reward.score(GREY, ["a red fox"]).item() == pytest.approx(1, abs=1e-5)
    scores = reward.measure(GREY, ["two blue pizzas"])
    assert scores.values.item() < 0.99 and scores.extras["answer"] == ["The image contains a red fox"]
    assert len(reward.model.encoder.layer) == 2
    model.answer = says(" ")
    assert reward.score(GREY, ["a red fox"]).isnan().all()
    reward.unload()
    assert reward.tokenizer is None


def test_bertscore_says_which_files_it_needs(tmp_path, model):
    with pytest.raises(RewardError, match="No weight folder"):
        BertScore(vlm=model.vlm).load()
    with pytest.raises(RewardError, match=r"pytorch_model.bin does not exist.*pcpo download bertscore"):
        BertScore(RewardSettings(folder=tmp_path), model.vlm).load()
