"""Simulated people: they vote by a preference, with errors."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from comfyui_pcpo.taste.human import Question, Reply

Preference = Callable[[Tensor], Tensor]  # uint8 (G, H, W, 3) -> (G,)


@dataclass
class Voter:
    """Answers by `preference`; a random image is taken for the best, and for the worst, in `error` of the votes."""

    preference: Preference
    error: float = 0.0
    seed: int = 0
    asked: list[Question] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, question: Question, /) -> Reply:
        self.asked.append(question)
        count = len(question.images)
        order = self.preference(question.images).argsort(descending=True).tolist()
        for place in range(count - 1):  # errors swap neighbours, so that a vote stays a ranking
            if self.random() < self.error:
                order[place], order[place + 1] = order[place + 1], order[place]
        ranks = [0] * count
        for rank, image in enumerate(order):
            ranks[image] = rank
        if question.choose == "best":
            ranks = [min(rank, 1) for rank in ranks]
        elif question.choose == "best and worst":
            ranks = [0 if rank == 0 else 2 if rank == count - 1 else 1 for rank in ranks]
        return Reply("vote", tuple(ranks), 1.0)

    def random(self) -> float:
        return float(torch.rand((), generator=self.generator))
