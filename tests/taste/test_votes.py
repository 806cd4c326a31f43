"""Votes: what a ranking scores, and what a folder of votes keeps."""

import json

import pytest
import torch

from comfyui_pcpo.taste.comparisons import from_liked, from_pairs, from_rankings, ranked_pairs
from comfyui_pcpo.taste.votes import VoteError, VoteFolder, check_ranks, rank_scores


def images(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("ranks", "scores"),
    [
        ((0, 1, 2), (1, 0, -1)),
        ((2, 0, 1, 3), (-1 / 3, 1, 1 / 3, -1)),
        ((1, 0, 1), (-0.5, 1, -0.5)),
        ((0, 1, 1, 2), (1, 0, 0, -1)),
        ((0, 0), (0, 0)),
    ],
)
def test_an_image_scores_the_share_it_beats_minus_the_share_that_beats_it(ranks, scores):
    torch.testing.assert_close(rank_scores(ranks), torch.tensor(scores, dtype=torch.float32))


@pytest.mark.parametrize("ranks", [(0, 1), (0, 1, 3), (-1, 0, 1), (0.5, 0, 1), (True, 0, 1)])
def test_ranks_that_do_not_fit_the_group_are_refused(ranks):
    with pytest.raises(VoteError, match=r"a group of 3 images needs 3 whole numbers from 0 .best. to 2"):
        check_ranks(ranks, 3)


def test_votes_come_back_with_their_images(tmp_path):
    folder = VoteFolder(tmp_path / "votes")
    vote = folder.add(images(), "a fox", (2, 0, 1), 3.21)
    (read,) = VoteFolder(tmp_path / "votes").votes()
    assert read == vote and read.ranks == (2, 0, 1) and read.seconds == 3.21
    assert torch.equal(torch.stack(folder.pixels(read.images)), images())


def test_a_group_is_known_again_by_its_pixels_and_prompt(tmp_path):
    folder = VoteFolder(tmp_path)
    keys = {folder.add(images(), prompt, (0, 1, 2)).group for prompt in ("a fox", "a fox", "a panda")}
    assert len(keys) == 2 and len(folder.votes()) == 2


def test_the_last_row_of_a_group_counts_and_undo_removes_it(tmp_path):
    folder = VoteFolder(tmp_path)
    folder.add(images(), "a fox", (0, 1, 2))
    vote = folder.add(images(), "a fox", (2, 1, 0))
    assert [v.ranks for v in folder.votes()] == [(2, 1, 0)]
    folder.undo(vote)
    assert folder.votes() == []
    folder.add(images(), "a fox", (0, 1, 1))
    assert [v.ranks for v in folder.votes()] == [(0, 1, 1)]


def test_skipped_groups_and_full_ties_teach_nothing(tmp_path):
    folder = VoteFolder(tmp_path)
    folder.add(images(seed=1), "a fox", ())
    folder.add(images(seed=2), "a fox", (0, 0, 0))
    folder.add(images(seed=3), "a fox", (0, 1, 1))
    assert len(folder.votes()) == 3 and [v.ranks for v in folder.ranked()] == [(0, 1, 1)]


def test_a_row_cut_short_by_a_crash_is_ignored_and_does_not_spoil_the_next(tmp_path):
    folder = VoteFolder(tmp_path)
    folder.add(images(seed=1), "a fox", (0, 1, 2))
    with folder.file.open("a") as file:
        file.write('{"group": "abc", "pro')
    assert len(folder.votes()) == 1
    folder.add(images(seed=2), "a fox", (0, 2, 1))
    assert [vote.ranks for vote in folder.votes()] == [(0, 1, 2), (0, 2, 1)]


def test_a_row_that_only_lacks_its_line_end_counts(tmp_path):
    folder = VoteFolder(tmp_path)
    folder.add(images(seed=1), "a fox", (0, 1, 2))
    folder.file.write_bytes(folder.file.read_bytes().rstrip(b"\n"))
    folder.add(images(seed=2), "a fox", (0, 2, 1))
    assert [vote.ranks for vote in folder.votes()] == [(0, 1, 2), (0, 2, 1)]


def test_the_last_row_counts_before_anything_is_added_too(tmp_path):
    folder = VoteFolder(tmp_path)
    folder.add(images(seed=1), "a fox", (0, 1, 2))
    folder.file.write_bytes(folder.file.read_bytes().rstrip(b"\n"))
    assert len(folder.votes()) == 1


@pytest.mark.parametrize("change", [{"group": ["a"]}, {"images": [1, 2, 3]}, {"prompt": None}])
def test_a_row_of_other_types_is_no_vote(tmp_path, change):
    folder = VoteFolder(tmp_path)
    row = {**vars(folder.add(images(), "a fox", (0, 1, 2))), **change}
    folder.file.write_text(json.dumps(row) + "\n")
    with pytest.raises(VoteError, match=r"line 1 is not a vote \(its group, prompt and images must be texts\)"):
        folder.votes()


def test_a_damaged_row_is_named_by_its_line(tmp_path):
    folder = VoteFolder(tmp_path)
    vote = folder.add(images(), "a fox", (0, 1, 2))
    row = {**vars(vote), "ranks": [0, 9, 2]}
    folder.file.write_text(folder.file.read_text() + json.dumps(row) + "\n")
    with pytest.raises(VoteError, match=r"votes.jsonl, line 2 is not a vote .*Remove the line"):
        folder.votes()


def test_ties_order_nothing_and_a_vote_counts_as_one_comparison_less_than_its_images():
    assert ranked_pairs((1, 0, 1)) == [(1, 0), (1, 2)]
    pairs = from_rankings([((5, 6, 7), (0, 1, 2)), ((8, 9), (1, 0))])
    assert pairs.better.tolist() == [5, 5, 6, 9] and pairs.worse.tolist() == [6, 7, 7, 8]
    assert pairs.vote.tolist() == [0, 0, 0, 1] and pairs.votes == 2
    torch.testing.assert_close(pairs.weight, torch.tensor([2 / 3, 2 / 3, 2 / 3, 1], dtype=torch.float64))


def test_each_liked_and_disliked_image_counts_once():
    pairs = from_liked([0, 1, 2, 3, 4], [5, 6], each=4)
    assert set(pairs.better.tolist()) == {0, 1, 2, 3, 4} and set(pairs.worse.tolist()) == {5, 6}
    assert float(pairs.weight.sum()) == pytest.approx(7) and pairs.votes == 7
    assert from_pairs([(3, 1)]).better.tolist() == [3]
