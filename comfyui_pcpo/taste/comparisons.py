"""Comparisons: which of two images was preferred, from rankings, from liked and disliked images, or from pairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_VOTES = 5  # that a taste is learned from


@dataclass(frozen=True)
class Comparisons:
    """M comparisons between N images.

    `better` and `worse` (M,) are rows of the images' features. `vote` (M,) numbers the votes that they come from.
    `weight` (M,): a vote on G images counts as G - 1 comparisons, however many pairs it orders, since they depend on
    each other.
    """

    better: Tensor
    worse: Tensor
    vote: Tensor
    weight: Tensor

    @property
    def votes(self) -> int:
        """Number of votes that order at least one pair."""
        return len(self.vote.unique())

    def select(self, chosen: Tensor) -> "Comparisons":
        """Only the comparisons marked by a mask (M,)."""
        return Comparisons(self.better[chosen], self.worse[chosen], self.vote[chosen], self.weight[chosen])


def ranked_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """All (better, worse) that a ranking orders; ties order nothing."""
    return [(a, b) for a, above in enumerate(ranks) for b, below in enumerate(ranks) if above < below]


def from_rankings(rankings: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Comparisons:
    """Votes as (rows of the images, their ranks)."""
    rows = []
    for number, (images, ranks) in enumerate(rankings):
        pairs = ranked_pairs(ranks)
        rows += [(images[a], images[b], number, (len(images) - 1) / len(pairs)) for a, b in pairs]
    return _stack(rows)


def from_pairs(pairs: Sequence[tuple[int, int]]) -> Comparisons:
    """Independent comparisons as (row of the better image, row of the worse one)."""
    return _stack([(better, worse, number, 1.0) for number, (better, worse) in enumerate(pairs)])


def from_liked(liked: Sequence[int], disliked: Sequence[int], each: int = 4) -> Comparisons:
    """Every liked image against up to `each` disliked ones and the reverse, in turn; each image is one vote.

    An image then counts once, whichever of the two sets is larger.
    """
    rows, pairs = [], min(each, len(disliked))
    for number, image in enumerate(liked):
        others = [disliked[(number + k) % len(disliked)] for k in range(pairs)]
        rows += [(image, other, number, 1 / pairs) for other in others]
    pairs = min(each, len(liked))
    for number, image in enumerate(disliked):
        others = [liked[(number + k) % len(liked)] for k in range(pairs)]
        rows += [(other, image, len(liked) + number, 1 / pairs) for other in others]
    return _stack(rows)


def joined(parts: Sequence[Comparisons]) -> Comparisons:
    """Comparisons of several sources, whose votes stay apart."""
    votes, start = [], 0
    for part in parts:
        votes.append(part.vote + start)
        start += int(part.vote.max()) + 1 if len(part.vote) else 0
    better, worse, weight = (torch.cat([getattr(part, n) for part in parts]) for n in ("better", "worse", "weight"))
    return Comparisons(better, worse, torch.cat(votes), weight)


def mean_per_vote(values: Tensor, pairs: Comparisons) -> Tensor:
    """Mean over each vote's comparisons, (M,) -> (votes,)."""
    _, row, sizes = pairs.vote.unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(sizes), dtype=values.dtype).index_add(0, row, values) / sizes


def standard_error(values: Tensor, pairs: Comparisons) -> float:
    """Standard error of the mean over votes of the comparisons' values (M,), whose votes may share images.

    The larger of two variances: comparisons correlated within each vote, and wherever they share an image (Aronow,
    Samii & Assenova 2015). They are equal for pairs that share none.
    """
    mean = mean_per_vote(values, pairs).mean()
    _, row, sizes = pairs.vote.unique(return_inverse=True, return_counts=True)
    parts = (values - mean) / sizes[row] / len(sizes)
    by_vote = torch.zeros(len(sizes), dtype=parts.dtype).index_add(0, row, parts)
    images = torch.stack([pairs.better, pairs.worse], 1)
    by_image = torch.zeros(int(images.max()) + 1, dtype=parts.dtype)
    by_image = by_image.index_add(0, images.flatten(), parts.repeat_interleave(2))
    same, pair = images.sort(1)[0].unique(dim=0, return_inverse=True)
    by_pair = torch.zeros(len(same), dtype=parts.dtype).index_add(0, pair, parts)
    shared = by_image.square().sum() - by_pair.square().sum()  # a pair is in the sums of two images
    return math.sqrt(max(float(by_vote.square().sum()), float(shared)))


def _stack(rows: list[tuple[int, int, int, float]]) -> Comparisons:
    better, worse, vote, weight = zip(*rows, strict=True) if rows else ((), (), (), ())
    first, second, votes = (torch.tensor(part, dtype=torch.long) for part in (better, worse, vote))
    return Comparisons(first, second, votes, torch.tensor(weight, dtype=torch.float64))
