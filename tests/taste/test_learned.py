"""A taste learned from simulated people: agreement with the true preference, files, and use as a reward."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from voters import Preference, Voter

from comfyui_pcpo.reward import RewardError, RewardSettings, load_reward
from comfyui_pcpo.taste.comparisons import Comparisons, from_liked, from_pairs, from_rankings
from comfyui_pcpo.taste.encoders import COLOR_STATISTICS, Encoder, load_encoder, tiny_encoder
from comfyui_pcpo.taste.human import HumanVote, Question, Reply, VoteSettings
from comfyui_pcpo.taste.learned import (
    Learned,
    Scaled,
    TasteReport,
    TasteReward,
    check_encoder,
    cross_validate,
    learn,
    load_taste,
    taste_reward,
)
from comfyui_pcpo.taste.votes import VoteError, VoteFolder
from tools.tiny.data import draw_scenes

GROUP, VOTES = 6, 40


def preference(name: str) -> Preference:
    reward = load_reward(name)
    return lambda images: reward.score(images.float() / 255, [""] * len(images))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return tiny_encoder(RewardSettings())


@pytest.fixture(scope="module")
def drawings() -> torch.Tensor:
    """uint8 (N, H, W, 3)."""
    return draw_scenes(500, seed=5).pixels.permute(0, 2, 3, 1).contiguous()


def voted(drawings: torch.Tensor, voter: Voter, folder: VoteFolder, votes: int = VOTES) -> None:
    for number in range(votes):
        images = drawings[number * GROUP : (number + 1) * GROUP]
        reply = voter(Question("", "", images, "ranking", number, votes, False, False))
        folder.add(images, "", reply.ranks)


def learned_from(folder: VoteFolder, encoder: Encoder) -> Learned:
    human = HumanVote(no_one, VoteSettings(folder), lambda: encoder)
    learned = human.learn()
    assert learned is not None
    return learned


def no_one(question: Question, /) -> Reply:
    raise AssertionError("nobody is to be asked")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["colorfulness", "redness", "jpeg_compressibility"])
def test_forty_votes_with_ten_percent_errors_predict_85_percent_of_new_pairs(name, drawings, encoder, tmp_path):
    truth, folder = preference(name), VoteFolder(tmp_path)
    voted(drawings, Voter(truth, error=0.1), folder)
    taste = learned_from(folder, encoder).taste
    new = drawings[VOTES * GROUP :]
    first, second = torch.randint(0, len(new), (2, 3000), generator=torch.Generator().manual_seed(0))
    utility, value = taste(encoder(new)), truth(new)
    apart = value[first] != value[second]
    agree = (utility[first] > utility[second]) == (value[first] > value[second])
    assert agree[apart].float().mean() >= 0.85
    assert taste.report.votes == VOTES


def test_random_votes_are_reported_as_worth_nothing(drawings, encoder, tmp_path):
    generator = torch.Generator().manual_seed(0)
    voter = Voter(lambda images: torch.rand(len(images), generator=generator))
    voted(drawings, voter, VoteFolder(tmp_path))
    report = learned_from(VoteFolder(tmp_path), encoder).taste.report
    assert abs(report.agreement - 0.5) < 3 * max(report.error, 0.03)


def reports_on_noise(pairs: Comparisons, images: int, seeds: int = 8, features: int = 100) -> list[TasteReport]:
    """What is reported where the features know nothing of the preference."""
    noise = [torch.randn(images, features, generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    return [cross_validate(Scaled.of(one), pairs) for one in noise]


def found_in_noise(pairs: Comparisons, images: int) -> float:
    return fmean(report.agreement for report in reports_on_noise(pairs, images))


def test_images_that_occur_in_several_comparisons_give_nothing_away():
    """Every liked image meets disliked ones that others meet too; so do images of recurring pairs."""
    assert found_in_noise(from_liked(range(40), range(40, 80)), 80) == pytest.approx(0.5, abs=0.1)
    drawn = torch.Generator().manual_seed(0)
    pairs = [tuple(torch.randperm(30, generator=drawn)[:2].tolist()) for _ in range(150)]
    assert found_in_noise(from_pairs(pairs), 30) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("pairs", "images"),
    [
        (from_liked(range(40), range(40, 80)), 80),
        (from_liked(range(60), range(60, 80)), 80),
        (from_pairs([(2 * number, 2 * number + 1) for number in range(60)]), 120),
        (from_pairs([(2 * number, 2 * number + 1) for number in range(30) for _ in range(3)]), 60),
        (from_rankings([(range(4 * number, 4 * number + 4), (1, 2, 3, 4)) for number in range(40)]), 160),
    ],
    ids=["liked", "liked few", "pairs", "repeated", "rankings"],
)
def test_the_reported_error_is_how_much_the_agreement_varies(pairs, images):
    """Liked images share the disliked ones that they meet: counted as independent, the error would be half of it."""
    reports = reports_on_noise(pairs, images, seeds=40, features=30)
    varies = stdev(report.agreement for report in reports)
    assert fmean(report.error for report in reports) == pytest.approx(varies, rel=0.3)


def test_liked_images_that_do_differ_are_told_from_disliked_ones():
    features = torch.randn(80, 20, generator=torch.Generator().manual_seed(0))
    features[:40, 0] += 3
    report = cross_validate(Scaled.of(features), from_liked(range(40), range(40, 80)))
    assert report.agreement > 0.85 and report.votes == 80


def test_votes_that_all_share_an_image_have_no_measured_agreement(tmp_path, encoder, drawings):
    """Whichever image is held out, none of the others is compared with it and not with what is learned from."""
    star = from_pairs([(0, other) for other in range(1, 12)])
    taste = learn(encoder(drawings[:12]), star, encoder).taste
    assert taste.report.sentence().startswith("11 votes: too many share images to hold some out")
    taste.save(tmp_path / "star.safetensors")
    assert load_taste(tmp_path / "star.safetensors").report.sentence() == taste.report.sentence()


def test_a_few_liked_and_disliked_images_are_held_out_too():
    features = torch.tensor([5.0, 6, 7, -5, -6, -7])[:, None] + torch.zeros(6, 3)
    assert cross_validate(Scaled.of(features), from_liked(range(3), range(3, 6))).agreement == 1


@pytest.mark.slow
def test_more_votes_are_said_to_help_where_they_do(drawings, encoder, tmp_path):
    truth = preference("jpeg_compressibility")
    reports = []
    for votes in (15, 60):
        voted(drawings, Voter(truth), VoteFolder(tmp_path / str(votes)), votes)
        reports.append(learned_from(VoteFolder(tmp_path / str(votes)), encoder).taste.report)
    few, many = reports
    assert many.agreement > few.agreement and few.agreement_doubled > few.agreement
    assert many.agreement_doubled - many.agreement < few.agreement_doubled - few.agreement
    assert "15 more are expected to raise this to" in few.sentence()


def test_no_gain_from_more_votes_is_said_plainly():
    assert TasteReport(40, 100, 0.9, 0.02, 0.9, 1.0).sentence() == (
        "40 votes: agrees with 90 +- 2 % of held-out votes. More votes are not expected to raise this."
    )


def test_fewer_than_five_votes_are_refused(encoder, drawings):
    pairs = from_rankings([((0, 1), (0, 1))] * 4)
    with pytest.raises(VoteError, match=r"Got 4 votes .* a taste needs at least 5"):
        learn(encoder(drawings[:2]), pairs, encoder)


def test_a_taste_comes_back_from_its_file_and_scores_alike(drawings, encoder, tmp_path):
    voted(drawings, Voter(preference("redness")), VoteFolder(tmp_path / "votes"), 10)
    taste = learned_from(VoteFolder(tmp_path / "votes"), encoder).taste
    taste.save(tmp_path / "reds.safetensors")
    reward = taste_reward(tmp_path / "reds.safetensors")
    images = drawings[:20].float() / 255
    torch.testing.assert_close(reward.score(images, [""] * 20), taste(encoder(drawings[:20])))
    assert reward.name == "reds" and not reward.needs_prompt
    assert load_taste(tmp_path / "reds.safetensors").report == taste.report


def test_the_utility_has_mean_0_and_deviation_1_on_the_voted_images(drawings, encoder, tmp_path):
    voted(drawings, Voter(preference("redness")), VoteFolder(tmp_path), 10)
    values = learned_from(VoteFolder(tmp_path), encoder).taste(encoder(drawings[: 10 * GROUP]))
    assert float(values.mean()) == pytest.approx(0, abs=1e-4)
    assert float(values.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_another_encoder_is_refused(drawings, encoder, tmp_path):
    voted(drawings, Voter(preference("redness")), VoteFolder(tmp_path), 10)
    taste = learned_from(VoteFolder(tmp_path), encoder).taste
    other = Encoder("other", lambda images: -encoder.encode(images))
    with pytest.raises(RewardError, match="learned on the image features of emoji-align, and other has others"):
        check_encoder(taste, other)
    retrained = Encoder(encoder.name, other.encode)
    with pytest.raises(RewardError, match="learned on another version of emoji-align, whose image features differ"):
        check_encoder(taste, retrained)
    check_encoder(taste, encoder)
    assert isinstance(TasteReward(taste, encoder=encoder).load(), TasteReward)


def test_a_refused_encoder_is_refused_again(drawings, encoder, tmp_path):
    voted(drawings, Voter(preference("redness")), VoteFolder(tmp_path), 10)
    taste = replace(learned_from(VoteFolder(tmp_path), encoder).taste, probe=-encoder.probe())
    reward = TasteReward(taste)
    for _ in range(2):
        with pytest.raises(RewardError, match="another version of emoji-align"):
            reward.score(drawings[:2].float() / 255, ["", ""])
    with pytest.raises(RewardError, match=r"of ComfyUI's CLIP Vision, which cannot be loaded here"):
        TasteReward(replace(taste, encoder="ComfyUI's CLIP Vision")).load()


def test_the_network_of_a_taste_moves_with_the_reward(drawings, encoder, tmp_path):
    """Rewards are read into CPU memory, and leave the GPU between two updates."""
    voted(drawings, Voter(preference("redness")), VoteFolder(tmp_path), 10)
    taste = learned_from(VoteFolder(tmp_path), encoder).taste
    room: list[int] = []
    reward = TasteReward(taste, RewardSettings(device="meta", make_room=room.append))
    assert {p.device.type for p in reward.to("cpu").load().model.parameters()} == {"cpu"} and not room
    expected = taste(encoder(drawings[:2]))
    torch.testing.assert_close(reward.score(drawings[:2].float() / 255, ["", ""]), expected)
    assert {p.device.type for p in reward.to("meta").model.parameters()} == {"meta"}
    assert room == [sum(p.nbytes for p in encoder.network.parameters())]
    reward.unload()
    assert reward.encoder is None and reward.model is None


def test_an_unknown_encoder_and_a_file_that_is_no_taste_are_refused(tmp_path):
    with pytest.raises(VoteError, match=r"'dino' is not a known image encoder. Use one of emoji-align, clip-vit-l-14"):
        load_encoder("dino", RewardSettings())
    for content in (b"", b"x" * 200):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(VoteError, match="cannot be read as a taste"):
            load_taste(tmp_path / "bad.safetensors")
    with pytest.raises(VoteError, match="cannot be read as a taste"):
        load_taste(tmp_path / "missing.safetensors")


def test_a_taste_that_names_no_encoder_is_refused(drawings, encoder, tmp_path):
    path = tmp_path / "taste.safetensors"
    voted(drawings, Voter(preference("redness")), VoteFolder(tmp_path / "votes"), 5)
    learned_from(VoteFolder(tmp_path / "votes"), encoder).taste.save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del metadata["encoder"]
    save_file(tensors, path, metadata)
    with pytest.raises(VoteError, match=r"cannot be read as a taste \('encoder'\)"):
        load_taste(path)


def test_color_statistics_of_a_plain_image():
    image = torch.tensor([200, 100, 50], dtype=torch.uint8).expand(1, 8, 8, 3)
    found = tiny_statistics(image)
    r, g, b = 200 / 255, 100 / 255, 50 / 255
    means = [r, g, b, r - g, (r + g) / 2 - b, r - b]
    torch.testing.assert_close(found[:24], torch.tensor(means).repeat_interleave(4))
    assert found[24:].abs().max() < 1e-6 and len(found) == COLOR_STATISTICS


def tiny_statistics(image: torch.Tensor) -> torch.Tensor:
    return Encoder("none", lambda images: torch.zeros(len(images), 0))(image)[0]


class TestHumanVote:
    def human(self, path: Path, ask, encoder: Encoder, **settings) -> HumanVote:
        return HumanVote(ask, VoteSettings(VoteFolder(path), **settings), lambda: encoder)

    def batch(self, drawings: torch.Tensor, groups: int, start: int = 0) -> tuple[torch.Tensor, list[str]]:
        images = drawings[start : start + groups * GROUP].float() / 255
        return images, [f"prompt {n // GROUP}" for n in range(groups * GROUP)]

    def test_votes_become_scores_of_their_group(self, drawings, encoder, tmp_path):
        replies = iter([Reply("vote", (0, 1, 2, 3, 4, 5)), Reply("vote", ()), Reply("vote", (1, 0, 1, 1, 1, 1))])
        human = self.human(tmp_path, lambda question: next(replies), encoder)
        scores = human.score(*self.batch(drawings, 3), group_size=GROUP).view(3, GROUP)
        torch.testing.assert_close(scores[0], torch.tensor([1, 0.6, 0.2, -0.2, -0.6, -1]))
        assert not scores[1].any()
        torch.testing.assert_close(scores[2], torch.tensor([-0.2, 1, -0.2, -0.2, -0.2, -0.2]))

    def test_an_interrupted_update_goes_on_with_the_votes_that_were_given(self, drawings, encoder, tmp_path):
        class Closed(Exception):
            pass

        given: list[str] = []

        def leaves(question: Question, /) -> Reply:
            if len(given) == 2:
                raise Closed
            given.append(question.prompt)
            return Reply("vote", (0, 1, 1, 1, 1, 1))

        with pytest.raises(Closed):
            self.human(tmp_path, leaves, encoder).score(*self.batch(drawings, 4), group_size=GROUP)
        asked: list[str] = []

        def returns(question: Question, /) -> Reply:
            asked.append(question.prompt)
            return Reply("vote", (1, 1, 1, 1, 1, 0))

        scores = self.human(tmp_path, returns, encoder).score(*self.batch(drawings, 4), group_size=GROUP)
        assert asked == ["prompt 2", "prompt 3"]
        assert scores.view(4, GROUP).argmax(1).tolist() == [0, 0, 5, 5]

    def test_undo_asks_the_last_group_again(self, drawings, encoder, tmp_path):
        first = Reply("vote", (0, 1, 1, 1, 1, 1))
        replies = iter([first, Reply("undo"), Reply("vote", (1, 0, 1, 1, 1, 1)), first])
        asked: list[Question] = []

        def ask(question: Question, /) -> Reply:
            asked.append(question)
            return next(replies)

        scores = self.human(tmp_path, ask, encoder).score(*self.batch(drawings, 2), group_size=GROUP)
        assert [q.prompt for q in asked] == ["prompt 0", "prompt 1", "prompt 0", "prompt 1"]
        assert [q.can_undo for q in asked] == [False, True, False, True]
        assert [q.number for q in asked] == [1, 2, 1, 2]
        assert scores.view(2, GROUP).argmax(1).tolist() == [1, 0]

    def test_after_the_wanted_votes_the_learned_taste_scores(self, drawings, encoder, tmp_path):
        truth = preference("redness")
        voter = Voter(truth)
        human = self.human(tmp_path, voter, encoder, choose="ranking", votes=20)
        human.score(*self.batch(drawings, 20), group_size=GROUP)
        images, prompts = self.batch(drawings, 10, start=300)
        scores = human.score(images, prompts, group_size=GROUP)
        assert len(voter.asked) == 20
        assert torch.corrcoef(torch.stack([scores, truth(drawings[300:360])]))[0, 1] > 0.8

    def test_finish_hands_the_rest_to_the_learned_taste(self, drawings, encoder, tmp_path):
        voter = Voter(preference("redness"))

        def ask(question: Question, /) -> Reply:
            return Reply("finish") if question.number > 12 else voter(question)

        human = self.human(tmp_path, ask, encoder, choose="ranking", votes=0)
        images, prompts = self.batch(drawings, 20)
        scores = human.score(images, prompts, group_size=GROUP).view(20, GROUP)
        assert len(VoteFolder(tmp_path).votes()) == 12 and (scores.std(1) > 0).all()
        assert scores.min() >= -1 and scores.max() <= 1

    def test_finish_waits_until_there_is_a_taste(self, drawings, encoder, tmp_path):
        asked: list[Question] = []

        def ask(question: Question, /) -> Reply:
            asked.append(question)
            return Reply("vote", (0, 1, 1, 1, 1, 1))

        self.human(tmp_path, ask, encoder).score(*self.batch(drawings, 7), group_size=GROUP)
        assert [q.can_finish for q in asked] == [False] * 5 + [True] * 2

    def test_a_vote_that_was_undone_leaves_the_learned_taste(self, drawings, encoder, tmp_path):
        vote, opposite = Reply("vote", (0, 1, 2, 3, 4, 5)), Reply("vote", (5, 4, 3, 2, 1, 0))
        replies = iter([vote] * 5 + [Reply("undo"), opposite, Reply("finish")])
        human = self.human(tmp_path, lambda question: next(replies), encoder, votes=0)
        human.score(*self.batch(drawings, 6), group_size=GROUP)
        learned, anew = human.learn(), learned_from(VoteFolder(tmp_path), encoder)
        assert learned is not None
        torch.testing.assert_close(learned.taste.weight, anew.taste.weight)

    def test_the_most_informative_group_is_asked_first(self, drawings, encoder, tmp_path):
        voted(drawings, Voter(preference("redness")), VoteFolder(tmp_path), 20)
        asked: list[str] = []

        def ask(question: Question, /) -> Reply:
            asked.append(question.prompt)
            return Reply("vote", ())

        human = self.human(tmp_path, ask, encoder, votes=0)
        same = drawings[300:301].expand(GROUP, -1, -1, -1)
        images = torch.cat([same, drawings[310 : 310 + GROUP], same]).float() / 255
        human.score(images, ["a"] * GROUP + ["b"] * GROUP + ["c"] * GROUP, group_size=GROUP)
        assert asked[0] == "b"

    def test_single_images_and_unattended_measurements_ask_nobody(self, drawings, encoder, tmp_path):
        human = self.human(tmp_path, no_one, encoder)
        assert human.score(drawings[:2].float() / 255, ["a", "b"]).tolist() == [0, 0]
        assert human.unattended().score(*self.batch(drawings, 1), group_size=GROUP).tolist() == [0] * GROUP
        voted(drawings, Voter(preference("redness")), VoteFolder(tmp_path), 10)
        images, prompts = self.batch(drawings, 2, start=300)
        torch.testing.assert_close(
            human.unattended().score(images, prompts, group_size=GROUP),
            learned_from(VoteFolder(tmp_path), encoder).taste(encoder(drawings[300 : 300 + 2 * GROUP])),
        )

    def test_a_vote_that_does_not_fit_is_refused_and_stores_nothing(self, drawings, encoder, tmp_path):
        human = self.human(tmp_path, lambda question: Reply("vote", (0, 7)), encoder)
        with pytest.raises(VoteError, match="a group of 6 images needs 6 whole numbers"):
            human.score(*self.batch(drawings, 1), group_size=GROUP)
        assert VoteFolder(tmp_path).votes() == []
