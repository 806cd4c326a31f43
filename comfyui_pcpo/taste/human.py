"""The reward that asks a person: groups of images are ranked by votes, and the rest by what was learned from them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from comfyui_pcpo.reward.base import Reward, RewardSettings, Scores, check_batch, eight_bit
from comfyui_pcpo.taste.comparisons import LEAST_VOTES, from_rankings
from comfyui_pcpo.taste.encoders import Encoder
from comfyui_pcpo.taste.learned import Learned, learn
from comfyui_pcpo.taste.votes import Vote, VoteFolder, group_key, rank_scores

Choose = Literal["best", "best and worst", "ranking"]
CHOICES: tuple[Choose, ...] = ("best", "best and worst", "ranking")


@dataclass(frozen=True)
class Question:
    """A group that a person is asked to rank, images uint8 (G, H, W, 3)."""

    text: str
    prompt: str
    images: Tensor
    choose: Choose
    number: int  # of this vote, from 1
    total: int  # votes wanted
    can_undo: bool  # an earlier vote of this update can be taken back
    can_finish: bool  # the learned taste can score the rest


@dataclass(frozen=True)
class Reply:
    """What a person did: voted (`ranks`, empty for a skip), took the last vote back, or left the rest to the taste."""

    action: Literal["vote", "undo", "finish"]
    ranks: tuple[int, ...] = ()
    seconds: float = 0.0


class Ask(Protocol):
    """Shows a question and waits for the reply. May raise, for example when the user cancels; votes are kept."""

    def __call__(self, question: Question, /) -> Reply: ...


@dataclass(frozen=True)
class VoteSettings:
    """How a person is asked."""

    folder: VoteFolder
    text: str = "Which image do you like best?"
    choose: Choose = "best"
    votes: int = 40  # after so many in the folder, the learned taste scores; 0 asks about every group


@dataclass
class Group:
    """One group of an update: its place in the batch, its images uint8 (G, H, W, 3) and its vote."""

    rows: slice
    prompt: str
    images: Tensor
    vote: Vote | None = None


class HumanVote(Reward):
    """Ranks of a person's votes, in [-1, 1] within each group; a skipped group scores 0 and trains nothing.

    Groups that were voted on before keep their votes, so an interrupted update goes on where it stopped. The groups of
    which the learned taste is least sure are asked first.
    """

    name = "human_vote"
    typical_range = (-1.0, 1.0)

    def __init__(
        self, ask: Ask, vote: VoteSettings, encoder: Callable[[], Encoder], settings: RewardSettings | None = None
    ):
        super().__init__(settings)
        self.ask, self.vote, self.make_encoder = ask, vote, encoder
        self.encoder: Encoder | None = None
        self.seen: dict[str, Tensor] = {}  # features (D,) by file name

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: list[str]) -> Scores:
        """Scores of whole groups; consecutive images of one prompt are a group."""
        check_batch(images, prompts)
        pixels = eight_bit(images).cpu()
        groups = [Group(rows, prompts[rows.start], pixels[rows]) for rows in group_rows(prompts)]
        known = {vote.group: vote for vote in self.vote.folder.votes()}
        for group in groups:
            group.vote = known.get(group_key(group.images, group.prompt))
        learned = self.ask_all(groups)
        scores = torch.zeros(len(prompts))
        for group in groups:
            if group.vote is not None:
                scores[group.rows] = rank_scores(group.vote.ranks) if group.vote.ranks else 0.0
            elif learned is not None:
                scores[group.rows] = learned.expected_scores(self.features(group.images))
        return Scores(scores)

    def ask_all(self, groups: list[Group]) -> Learned | None:
        """Ask about open groups until all are voted on, enough votes are in, or the user finishes."""
        learned, asked = self.learn(), []
        while True:
            open_groups = [group for group in groups if group.vote is None]
            count = sum(bool(vote.ranks) for vote in self.vote.folder.votes())
            enough = 0 < self.vote.votes <= count and learned is not None
            if not open_groups or enough:
                return learned
            group = self.most_informative(open_groups, learned)
            reply = self.ask(self.question(group, count + 1, bool(asked), learned is not None))
            if reply.action == "finish" and learned is not None:
                return learned
            if reply.action == "undo" and asked:
                last = asked.pop()
                self.vote.folder.undo(last.vote)
                last.vote = None
            elif reply.action == "vote":
                group.vote = self.vote.folder.add(group.images, group.prompt, reply.ranks, reply.seconds)
                asked.append(group)
            learned = self.learn()

    def question(self, group: Group, number: int, can_undo: bool, can_finish: bool) -> Question:
        v = self.vote
        return Question(v.text, group.prompt, group.images, v.choose, number, v.votes, can_undo, can_finish)

    def most_informative(self, groups: list[Group], learned: Learned | None) -> Group:
        if learned is None:
            return groups[0]
        return max(groups, key=lambda group: learned.information(self.features(group.images)))

    def learn(self) -> Learned | None:
        """The taste of all votes in the folder; None while there are too few."""
        votes = self.vote.folder.ranked()
        if len(votes) < LEAST_VOTES:
            return None
        names = list(dict.fromkeys(name for vote in votes for name in vote.images))
        row = {name: n for n, name in enumerate(names)}
        pairs = from_rankings([([row[name] for name in vote.images], vote.ranks) for vote in votes])
        return learn(torch.stack([self.file_features(name) for name in names]), pairs, self.loaded_encoder())

    def loaded_encoder(self) -> Encoder:
        self.encoder = self.encoder or self.make_encoder()
        return self.encoder

    def features(self, images: Tensor) -> Tensor:
        """uint8 (G, H, W, 3) -> (G, D)."""
        return self.loaded_encoder()(images)

    def file_features(self, name: str) -> Tensor:
        if name not in self.seen:
            self.seen[name] = self.features(self.vote.folder.pixels([name])[0][None])[0]
        return self.seen[name]


def group_rows(prompts: list[str]) -> list[slice]:
    """Consecutive equal prompts as slices of the batch."""
    starts = [n for n, prompt in enumerate(prompts) if n == 0 or prompt != prompts[n - 1]]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(prompts)], strict=True)]
