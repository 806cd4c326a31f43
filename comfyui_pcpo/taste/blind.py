"""Blind comparison of two sides: pairs in random order and side, and the win rate with its interval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from comfyui_pcpo.reward.base import eight_bit
from comfyui_pcpo.taste.human import Ask, Question
from comfyui_pcpo.taste.votes import VoteError


@dataclass(frozen=True)
class BlindPair:
    """Row `row` of both sides as it is shown, uint8 (2, H, W, 3); side B comes first if `swapped`."""

    row: int
    images: Tensor
    swapped: bool

    def win_of_b(self, ranks: Sequence[int]) -> float:
        """1 if B was preferred, 0 if A, 0.5 for a tie or a skip."""
        if not ranks or ranks[0] == ranks[1]:
            return 0.5
        return float((ranks[0] < ranks[1]) == self.swapped)


def blind_pairs(a: Tensor, b: Tensor, count: int, seed: int) -> list[BlindPair]:
    """Pairs of two sides, float (N, H, W, C) in [0, 1] each, in random order; `count` of them, or all for 0."""
    if a.shape[:3] != b.shape[:3]:
        raise VoteError(
            f"Side A has {len(a)} images of {a.shape[2]} x {a.shape[1]}, side B {len(b)} of {b.shape[2]} x "
            f"{b.shape[1]}, but they are compared in pairs. Give as many images of the same size."
        )
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(a), generator=generator).tolist()
    swapped = (torch.rand(len(a), generator=generator) < 0.5).tolist()
    sides = eight_bit(a).cpu(), eight_bit(b).cpu()
    pairs = []
    for row in rows[: count or None]:
        first, second = sides[::-1] if swapped[row] else sides
        pairs.append(BlindPair(row, torch.stack([first[row], second[row]]), swapped[row]))
    return pairs


def pair_question(pairs: Sequence[BlindPair], number: int, text: str) -> Question:
    """The question about a pair; the vote before it can be taken back."""
    return Question(text, "", pairs[number].images, "best", number + 1, len(pairs), number > 0, False)


def vote_on(
    pairs: Sequence[BlindPair], text: str, ask: Ask, keep: Callable[[list[float]], object], wins: Sequence[float] = ()
) -> list[float]:
    """Ask about each pair, and go on after the pairs that `wins` are of; the last vote can be taken back.

    -> for each pair 1 if B won, 0 if A, 0.5 for a tie. `keep` gets them after every vote, so that none is lost.
    """
    wins = list(wins)
    while len(wins) < len(pairs):
        reply = ask(pair_question(pairs, len(wins), text))
        if reply.action == "undo":
            wins.pop()
        else:
            wins.append(pairs[len(wins)].win_of_b(reply.ranks))
        keep(wins)
    return wins


@dataclass(frozen=True)
class WinRate:
    """Share of votes for side B, ties as halves, with its 95 % interval."""

    rate: float
    low: float
    high: float
    votes: int
    ties: int


def win_rate(wins: Sequence[float], confidence: float = 0.95) -> WinRate:
    """Wilson's score interval (1927, Probable Inference, the Law of Succession, and Statistical Inference).

    wins: 1 for B, 0 for A, 0.5 for a tie.
    """
    n = len(wins)
    if not n:
        raise VoteError("No pair was voted on. Give at least one.")
    p, z = sum(wins) / n, NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return WinRate(p, max(0.0, middle - half), min(1.0, middle + half), n, sum(win == 0.5 for win in wins))


def sentence(rate: WinRate) -> str:
    """The result in words."""
    interval = f"{100 * rate.low:.0f} to {100 * rate.high:.0f} %"
    verdict = "B is preferred" if rate.low > 0.5 else "A is preferred" if rate.high < 0.5 else "no clear preference"
    ties = f", {rate.ties} ties" if rate.ties else ""
    return f"B wins {100 * rate.rate:.0f} % (95 % interval {interval}) of {rate.votes} pairs{ties}: {verdict}."
