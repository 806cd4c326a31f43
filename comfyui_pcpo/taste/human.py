"""The reward that asks a person: groups of images are ranked by votes, and the rest by what was learned from them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from comfyui_pcpo.reward.base import Reward, RewardSettings, Scores, check_batch, eight_bit
from comfyui_pcpo.reward.group import GroupReward
from comfyui_pcpo.taste.comparisons import LEAST_VOTES, from_rankings
from comfyui_pcpo.taste.encoders import Encoder
from comfyui_pcpo.taste.learned import Learned, learn
from comfyui_pcpo.taste.votes import Choose, Vote, VoteFolder, group_key, rank_scores

REFIT_EVERY = 5  # votes; between two questions, a slightly older fit is used
FILES_AT_ONCE = 32  # images per forward pass of the encoder


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
    features: Tensor | None = None  # (G, D), once they are needed


class HumanVote(GroupReward):
    """Ranks of a person's votes, in [-1, 1] within each group; a skipped group scores 0 and trains nothing.

    Groups that were voted on before keep their votes, so an interrupted update goes on where it stopped. The groups of
    which the learned taste is least sure are asked first. With enough votes it scores all groups, by its utility.
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
        self.last: tuple[list[Vote], Learned] | None = None  # a fit, and the votes that it is of

    def score_group(self, images: Tensor, prompt: str) -> Tensor:
        """What the learned taste finds, or zeros while there is none; `measure` asks."""
        learned = self.learn()
        return torch.zeros(len(images)) if learned is None else learned.taste(self.features(images))

    def unattended(self) -> Reward:
        """The learned taste, for measurements beside the training."""
        return Unattended(self)

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: list[str], group_size: int | None = None) -> Scores:
        """Scores of whole groups, by votes or by the learned taste; see GroupReward."""
        check_batch(images, prompts)
        pixels = eight_bit(images).cpu()
        groups = [Group(rows, prompts[rows.start], pixels[rows]) for rows in self.parts(prompts, group_size)]
        known = {vote.group: vote for vote in self.vote.folder.votes()}
        for group in groups:
            group.vote = known.get(group_key(group.images, group.prompt))
        learned = self.ask_all([group for group in groups if len(group.images) > 1])
        if all(group.vote is None for group in groups):
            return Scores(torch.zeros(len(prompts)) if learned is None else learned.taste(self.features(pixels)))
        scores = torch.zeros(len(prompts))
        for group in groups:
            if group.vote is not None:
                scores[group.rows] = rank_scores(group.vote.ranks) if group.vote.ranks else 0.0
            elif learned is not None:
                scores[group.rows] = learned.expected_scores(self.group_features(group))
        return Scores(scores)

    def ask_all(self, groups: list[Group]) -> Learned | None:
        """Ask about open groups until all are voted on, enough votes are in, or the user finishes."""
        learned, asked = self.learn(), []
        while True:
            open_groups = [group for group in groups if group.vote is None]
            count = sum(bool(vote.ranks) for vote in self.vote.folder.votes())
            enough = 0 < self.vote.votes <= count and learned is not None
            if not open_groups or enough:
                return self.learn()
            group = self.most_informative(open_groups, learned)
            reply = self.ask(self.question(group, count + 1, bool(asked), learned is not None))
            if reply.action == "finish" and learned is not None:
                return self.learn()
            if reply.action == "undo" and asked:
                last = asked.pop()
                self.vote.folder.undo(last.vote)
                last.vote = None
            elif reply.action == "vote":
                group.vote = self.vote.folder.add(group.images, group.prompt, reply.ranks, reply.seconds)
                asked.append(group)
            learned = self.learn(REFIT_EVERY)

    def question(self, group: Group, number: int, can_undo: bool, can_finish: bool) -> Question:
        v = self.vote
        return Question(v.text, group.prompt, group.images, v.choose, number, v.votes, can_undo, can_finish)

    def most_informative(self, groups: list[Group], learned: Learned | None) -> Group:
        if learned is None:
            return groups[0]
        return max(groups, key=lambda group: learned.information(self.group_features(group)))

    def learn(self, refit_every: int = 1) -> Learned | None:
        """The taste of all votes in the folder, or a fit of fewer than `refit_every` votes less; None if too few."""
        votes = self.vote.folder.ranked()
        if len(votes) < LEAST_VOTES:
            return None
        if self.last is not None:
            fitted, learned = self.last
            if votes[: len(fitted)] == fitted and len(votes) - len(fitted) < refit_every:
                return learned
        names = list(dict.fromkeys(name for vote in votes for name in vote.images))
        row = {name: n for n, name in enumerate(names)}
        pairs = from_rankings([([row[name] for name in vote.images], vote.ranks) for vote in votes])
        learned = learn(self.file_features(names), pairs, self.loaded_encoder())
        self.last = votes, learned
        return learned

    def loaded_encoder(self) -> Encoder:
        self.encoder = self.encoder or self.make_encoder()
        return self.encoder

    def features(self, images: Tensor) -> Tensor:
        """uint8 (G, H, W, 3) -> (G, D)."""
        return self.loaded_encoder()(images)

    def group_features(self, group: Group) -> Tensor:
        """(G, D), computed once."""
        if group.features is None:
            group.features = self.features(group.images)
        return group.features

    def file_features(self, names: list[str]) -> Tensor:
        """Features of images in the folder, (N, D); each is computed once."""
        new = [name for name in names if name not in self.seen]
        for part in (new[start : start + FILES_AT_ONCE] for start in range(0, len(new), FILES_AT_ONCE)):
            images = self.vote.folder.pixels(part)
            same = all(image.shape == images[0].shape for image in images)
            found = self.features(torch.stack(images)) if same else torch.cat([self.features(x[None]) for x in images])
            self.seen.update(zip(part, found, strict=True))
        return torch.stack([self.seen[name] for name in names])


class Unattended(GroupReward):
    """Scores by the taste that HumanVote has learned so far; asks nobody."""

    name = HumanVote.name
    typical_range = (-3.0, 3.0)

    def __init__(self, human: HumanVote):
        super().__init__(human.settings)
        self.human = human

    def score_group(self, images: Tensor, prompt: str) -> Tensor:
        return self.human.score_group(images.cpu(), prompt)
